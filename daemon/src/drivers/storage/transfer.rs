//! Uploads and downloads: a volume's file as it is, through a stream.

use std::sync::Arc;
use std::time::Duration;

use images::File;
use rpc::error::RemoteError;
use rpc::stream::{Stream, StreamEvent, StreamReader, StreamWriter};

use super::object::Pool;
use super::volume::{InUse, open_to_change};
use super::{Driver, error, folder, image_error, system};
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::events::PoolEvent;

/// VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM, VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM
const SPARSE: u32 = 1;
/// Bytes read at a time.
const PIECE: u64 = 1 << 20;
/// How long a client may take to end a stream after its last data.
const PARTING: Duration = Duration::from_secs(30);

/// A part of a volume's file on its way.
struct Transfer {
    pool: Arc<Pool>,
    name: String,
    file: Arc<File>,
    offset: u64,
    /// How much, if that is limited.
    length: Option<u64>,
    sparse: bool,
    _in_use: InUse,
}

impl Driver {
    /// Writes what a client sends into a volume.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID while somebody uses it; the system's.
    pub async fn upload(
        self: &Arc<Self>,
        volume: (&str, &str),
        (offset, length): (u64, u64),
        flags: u32,
        stream: Stream,
    ) -> Result<()> {
        check_flags(flags, SPARSE, "storageVolUpload")?;
        if flags & SPARSE != 0 {
            stream.allow_holes();
        }
        let pool = self.pool_of(volume.0).await?;
        let (known, in_use) = super::volume::take(&pool, volume.1)?;
        let name = known.name.clone();
        let file = pool.run(move || open_to_change(&known)).await?;
        let transfer = Transfer {
            pool,
            name,
            file: Arc::new(file),
            offset,
            length: (length > 0).then_some(length),
            sparse: flags & SPARSE != 0,
            _in_use: in_use,
        };
        let driver = Arc::clone(self);
        tokio::spawn(async move {
            let Stream { mut reader, writer } = stream;
            match transfer.receive(&mut reader).await {
                Ok(true) => {
                    driver.uploaded(&transfer).await;
                    // The client left in the meantime at worst.
                    let _ = writer.finish().await;
                }
                // It gave up, or is gone.
                Ok(false) => driver.uploaded(&transfer).await,
                Err(why) => {
                    driver.uploaded(&transfer).await;
                    writer.abort(RemoteError::from(why)).await;
                }
            }
        });
        Ok(())
    }

    /// A volume may be another kind of image now.
    async fn uploaded(&self, transfer: &Transfer) {
        let path = {
            let inner = transfer.pool.lock();
            match inner.volume(&transfer.name) {
                Ok(entry) => entry.volume.path.clone(),
                Err(_) => return,
            }
        };
        let name = transfer.name.clone();
        let looked = transfer
            .pool
            .run(move || {
                folder::look(&path, &name)
                    .map_err(|e| system(format!("cannot open volume '{path}'"), &e))
            })
            .await;
        match looked {
            Ok(Some(volume)) => {
                let mut inner = transfer.pool.lock();
                let before = inner.volumes.get(&transfer.name);
                let before = before.and_then(|entry| entry.volume.allocation);
                inner.account(before, volume.allocation);
                if let Some(entry) = inner.volumes.get_mut(&transfer.name) {
                    entry.volume = volume;
                }
            }
            Ok(None) => {}
            Err(error) => log::warn!("volume '{}' after an upload: {error}", transfer.name),
        }
        self.emit(&transfer.pool, PoolEvent::Refreshed);
    }

    /// Sends a volume to a client.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID while it is being made; the system's.
    pub async fn download(
        self: &Arc<Self>,
        volume: (&str, &str),
        (offset, length): (u64, u64),
        flags: u32,
        stream: Stream,
    ) -> Result<()> {
        check_flags(flags, SPARSE, "storageVolDownload")?;
        if flags & SPARSE != 0 {
            stream.allow_holes();
        }
        let pool = self.pool_of(volume.0).await?;
        let (path, in_use) = {
            let mut inner = pool.lock();
            inner.check_active()?;
            let entry = inner.volume_mut(volume.1)?;
            entry.check_built()?;
            (entry.volume.path.clone(), InUse::mark(&pool, entry))
        };
        let open = move || {
            let file = folder::open(&path, false)
                .map_err(|e| system(format!("cannot open volume '{path}'"), &e))?;
            File::new(file.into(), path).map_err(image_error)
        };
        let transfer = Transfer {
            file: Arc::new(pool.run(open).await?),
            pool,
            name: volume.1.to_owned(),
            offset,
            length: (length > 0).then_some(length),
            sparse: flags & SPARSE != 0,
            _in_use: in_use,
        };
        tokio::spawn(async move {
            let Stream { reader, writer } = stream;
            match transfer.send(&writer).await {
                Ok(true) => part(reader, writer).await,
                Ok(false) => {}
                Err(why) => writer.abort(RemoteError::from(why)).await,
            }
        });
        Ok(())
    }
}

/// Waits for the client's end of the stream.
async fn part(mut reader: StreamReader, writer: StreamWriter) {
    let finished = async {
        loop {
            match reader.next().await {
                Ok(Some(StreamEvent::Finish)) => return true,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return false,
            }
        }
    };
    if tokio::time::timeout(PARTING, finished).await == Ok(true) {
        // The client left in the meantime at worst.
        let _ = writer.finish().await;
    }
}

impl Transfer {
    /// Takes what comes; true when the client is through and everything is on the disk.
    async fn receive(&self, reader: &mut StreamReader) -> Result<bool> {
        let mut at = self.offset;
        let end = self.length.map(|len| self.offset.saturating_add(len));
        let too_much = |at: u64, len: u64| match at.checked_add(len) {
            Some(after) => end.is_some_and(|end| after > end),
            None => true,
        };
        let full = || -> Error {
            error(
                ErrorCode::OPERATION_FAILED,
                format!(
                    "more data came for volume '{}' than was announced",
                    self.name
                ),
            )
        };
        loop {
            match reader.next().await {
                Ok(Some(StreamEvent::Data(data))) => {
                    let len = data.len() as u64;
                    if too_much(at, len) {
                        return Err(full());
                    }
                    let file = Arc::clone(&self.file);
                    let write = move || file.write_bytes(at, &data).map_err(image_error);
                    self.pool.run(write).await?;
                    at += len;
                }
                Ok(Some(StreamEvent::Hole(len))) => {
                    if too_much(at, len) {
                        return Err(full());
                    }
                    let file = Arc::clone(&self.file);
                    self.pool.run(move || punch(&file, at, len)).await?;
                    at += len;
                }
                Ok(Some(StreamEvent::Finish)) => {
                    let file = Arc::clone(&self.file);
                    let sync = move || file.sync().map_err(image_error);
                    self.pool.run(sync).await?;
                    return Ok(true);
                }
                Ok(Some(StreamEvent::EndOfData)) => {}
                Ok(None) | Err(_) => return Ok(false),
            }
        }
    }

    /// Sends what there is; true when all of it is on its way.
    async fn send(&self, writer: &StreamWriter) -> Result<bool> {
        let file = Arc::clone(&self.file);
        let size = self
            .pool
            .run(move || file.size().map_err(image_error))
            .await?;
        let mut at = self.offset.min(size);
        let end = match self.length {
            Some(len) => self.offset.saturating_add(len).min(size),
            None => size,
        };
        while at < end {
            let file = Arc::clone(&self.file);
            let sparse = self.sparse;
            let (data, len) = self
                .pool
                .run(move || next_piece(&file, at, end, sparse))
                .await?;
            let sent = match data {
                Some(data) => writer.write(&data).await,
                None => writer.hole(len).await,
            };
            if sent.is_err() {
                return Ok(false);
            }
            at += len;
        }
        Ok(writer.end_of_data().await.is_ok())
    }
}

/// The next data, or none for a hole, and how long it is.
fn next_piece(file: &File, at: u64, end: u64, sparse: bool) -> Result<(Option<Vec<u8>>, u64)> {
    let mut len = end - at;
    if sparse {
        let (data, run) = file.data_at(at, len).map_err(image_error)?;
        len = run.clamp(1, len);
        if !data {
            return Ok((None, len));
        }
    }
    len = len.min(PIECE);
    let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_bytes(at, &mut data).map_err(image_error)?;
    Ok((Some(data), len))
}

/// What lies in a hole reads as zeroes, and takes no room where the file system can do that.
fn punch(file: &File, at: u64, len: u64) -> Result<()> {
    let size = file.size().map_err(image_error)?;
    let end = at.saturating_add(len);
    if at < size {
        file.zero(at, end.min(size) - at, true)
            .map_err(image_error)?;
    }
    if end > size && !file.is_block_device() {
        file.set_len(end).map_err(image_error)?;
    }
    Ok(())
}
