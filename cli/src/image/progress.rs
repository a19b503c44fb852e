//! `-p`: how far a long command is.

use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;

use images::Job;

/// Prints how far a job is, in steps of so many percent.
#[derive(Debug, Clone)]
pub struct Progress {
    shown: Option<Arc<Mutex<(f64, f64)>>>,
}

fn print(percent: f64) {
    let mut out = std::io::stdout().lock();
    let _ = write!(out, "    ({percent:.2}/100%)\r");
    let _ = out.flush();
}

impl Progress {
    /// Prints if it is `wanted`.
    pub fn new(wanted: bool, step: f64) -> Self {
        let shown = wanted.then(|| {
            print(0.0);
            Arc::new(Mutex::new((0.0, step)))
        });
        Self { shown }
    }

    /// A job that is watched.
    pub fn job(&self) -> Job {
        let Some(shown) = self.shown.clone() else {
            return Job::new();
        };
        Job::watched(move |done, total| {
            let percent = if total == 0 {
                100.0
            } else {
                (done as f64 / total as f64 * 100.0).min(100.0)
            };
            let mut shown = shown
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            if percent >= shown.0 + shown.1 {
                shown.0 = percent;
                print(percent);
            }
        })
    }

    /// All is done.
    pub fn end(&self) {
        if self.shown.is_some() {
            print(100.0);
            crate::image::say("\n");
        }
    }
}
