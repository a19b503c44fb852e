//! What goes wrong with images.

/// Why an image can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's I/O failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done to which file.
        what: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The header names a feature that is not understood, or a value that is not allowed.
    #[error("{image}: {reason}")]
    Unsupported {
        /// The image's name.
        image: String,
        /// Which feature or value.
        reason: String,
    },
    /// The image's own structures contradict each other.
    #[error("{image} is corrupt: {reason}")]
    Corrupt {
        /// The image's name.
        image: String,
        /// Where and how.
        reason: String,
    },
    /// Somebody else uses the image.
    #[error("{image} is in use{holder}")]
    Locked {
        /// The image's name.
        image: String,
        /// ` by process N (name)` where known, else empty.
        holder: String,
    },
    /// The caller asked for something impossible.
    #[error("{0}")]
    Invalid(String),
    /// The job was cancelled: what it had begun is left as its documentation says.
    #[error("the job was cancelled")]
    Cancelled,
    /// The passphrase opens no key slot.
    #[error("{image}: the passphrase is wrong")]
    Passphrase {
        /// The image's name.
        image: String,
    },
}

impl Error {
    /// The host's error number, for a caller that has to answer with one (`EIO` where there is
    /// none of its own).
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Cancelled => libc::ECANCELED,
            _ => libc::EIO,
        }
    }
}
