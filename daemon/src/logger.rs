//! Messages to standard error and to the daemon's log file, in libvirt's line format.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// A log file larger than this is put aside when the daemon starts.
const ROTATE_AT: u64 = 4 << 20;

struct Logger {
    stderr_level: LevelFilter,
    file: Option<Mutex<File>>,
}

/// Starts logging. `verbose`: 0 shows warnings on standard error, 1 also information, 2 all.
///
/// # Errors
/// The log file cannot be opened; messages then go to standard error only.
pub fn start(verbose: u8, path: &Path) -> io::Result<()> {
    let stderr_level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Trace,
    };
    let file = open_log(path);
    let (file, result) = match file {
        Ok(file) => (Some(Mutex::new(file)), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let logger = Box::new(Logger { stderr_level, file });
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(stderr_level.max(LevelFilter::Info));
    }
    result
}

/// Opens a log for appending; one that has grown too large becomes `PATH.0`.
///
/// # Errors
/// The system's.
pub fn open_log(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > ROTATE_AT) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".0");
        std::fs::rename(path, aside)?;
    }
    OpenOptions::new()
        .append(true)
        .read(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        let line = format!(
            "{}: {}: {level} : {}\n",
            timestamp(SystemTime::now()),
            std::process::id(),
            record.args()
        );
        if record.level() <= self.stderr_level {
            // There is nowhere left to report that reporting failed.
            let _ = io::stderr().write_all(line.as_bytes());
        }
        if let Some(file) = &self.file
            && let Ok(mut file) = file.lock()
        {
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// `2026-11-22 20:15:04.061+0000`
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let days = since.as_secs() / 86_400;
    let second = since.as_secs() % 86_400;
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{:03}+0000",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

/// Year, month and day of a day since 1970-01-01 in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last day of a year.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_libvirt_writes_them() {
        let at = |seconds, ms| {
            timestamp(UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_millis(ms))
        };
        assert_eq!(at(0, 0), "1970-01-01 00:00:00.000+0000");
        assert_eq!(at(951_782_399, 5), "2000-02-28 23:59:59.005+0000");
        assert_eq!(at(951_782_400, 0), "2000-02-29 00:00:00.000+0000");
        assert_eq!(at(1_795_378_504, 61), "2026-11-22 20:15:04.061+0000");
    }
}
