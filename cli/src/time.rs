//! The current time as text, for logs and event stamps.

use std::ffi::CString;
use std::time::{SystemTime, UNIX_EPOCH};

/// The current local time in a format of `strftime(3)`.
pub fn local(format: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = libc::time_t::try_from(now.as_secs()).unwrap_or(0);
    strftime(format, seconds, false)
}

/// A time, seconds since the epoch, as local time in a format of `strftime(3)`.
pub fn local_at(format: &str, seconds: i64) -> String {
    strftime(format, seconds, false)
}

/// The current time in UTC as libvirt stamps events: `2026-01-31 12:34:56.789+0000`.
pub fn event_stamp() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = libc::time_t::try_from(now.as_secs()).unwrap_or(0);
    format!(
        "{}.{:03}+0000",
        strftime("%Y-%m-%d %H:%M:%S", seconds, true),
        now.subsec_millis()
    )
}

fn strftime(format: &str, seconds: libc::time_t, utc: bool) -> String {
    let Ok(format) = CString::new(format) else {
        return String::new();
    };
    let mut buffer = [0u8; 64];
    // SAFETY: `tm` is plain data for which all zeroes is valid; the pointers are to live locals, and
    // `strftime` is told the buffer's true size and writes at most that many bytes.
    let length = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        let broken_down = if utc {
            libc::gmtime_r(&seconds, &mut tm)
        } else {
            libc::localtime_r(&seconds, &mut tm)
        };
        if broken_down.is_null() {
            return String::new();
        }
        libc::strftime(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            format.as_ptr(),
            &tm,
        )
    };
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_in_utc_with_milliseconds() {
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S", 1_000_000_000, true),
            "2001-09-09 01:46:40"
        );
        let stamp = event_stamp();
        assert_eq!(stamp.len(), "2026-01-31 12:34:56.789+0000".len(), "{stamp}");
        assert!(stamp.ends_with("+0000"), "{stamp}");
    }
}
