//! `vol-upload`, `vol-download`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;

use rpc::args::{StorageVolDownloadArgs, StorageVolUploadArgs};
use rpc::client::Client;
use rpc::procs;
use rpc::stream::{Stream, StreamError, StreamEvent, StreamWriter};

use super::os_message;
use super::volume::{By, IN_POOL, VOL, find};
use crate::command::{Args, Command, Opt, Values, data, flag, number};
use crate::connection;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const FILE: Opt = data("file", "the file").values(Values::Files);

/// `vol-upload`
pub const VOL_UPLOAD: Command = Command {
    name: "vol-upload",
    summary: "upload file contents to a volume",
    description: "Writes a file into a volume, as it is.",
    options: &[
        VOL,
        FILE,
        IN_POOL,
        number("offset", "where in the volume it goes, bytes"),
        number("length", "how much of it, bytes"),
        flag("sparse", "holes stay holes"),
    ],
    handler: upload,
    connects: true,
};

/// `vol-download`
pub const VOL_DOWNLOAD: Command = Command {
    name: "vol-download",
    summary: "download volume contents to a file",
    description: "Writes a volume into a file, as it is.",
    options: &[
        VOL,
        FILE,
        IN_POOL,
        number("offset", "where in the volume to begin, bytes"),
        number("length", "how much of it, bytes"),
        flag("sparse", "holes stay holes"),
    ],
    handler: download,
    connects: true,
};

/// `VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM`, `VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM`
const SPARSE: u32 = 1;
/// Bytes read at a time.
const PIECE: usize = 256 * 1024;

fn stream_failure(error: StreamError) -> Failure {
    connection::failure(error.into())
}

fn local(what: &str, path: &str, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot {what} {path}: {}", os_message(error)))
}

fn upload(shell: &mut Shell, args: &Args) -> Result {
    let (offset, length) = (
        args.number("offset")?.unwrap_or(0),
        args.number("length")?.unwrap_or(0),
    );
    let vol = find(shell, args, By::Any)?;
    let path = args.required("file")?;
    let mut file = File::open(path).map_err(|_| Failure::new(format!("cannot read {path}")))?;
    let name = vol.name.clone();
    let sparse = args.has("sparse");
    let asked = StorageVolUploadArgs {
        vol,
        offset,
        length,
        flags: if sparse { SPARSE } else { 0 },
    };
    let connection = shell.connection()?;
    connection.check_access(procs::STORAGE_VOL_UPLOAD.number())?;
    connection.run(async |client: Client| {
        let called = if sparse {
            client
                .call_sparse_stream(procs::STORAGE_VOL_UPLOAD, &asked)
                .await
        } else {
            client.call_stream(procs::STORAGE_VOL_UPLOAD, &asked).await
        };
        let ((), stream) = called
            .map_err(connection::failure)
            .with_context(|| format!("cannot upload to volume {name}"))?;
        let Stream { mut reader, writer } = stream;
        // The daemon's reason comes while nobody waits for data.
        let refused = async {
            loop {
                match reader.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => std::future::pending::<()>().await,
                    Err(error) => return stream_failure(error),
                }
            }
        };
        let sent = tokio::select! {
            sent = send(&mut file, path, sparse, &writer) => sent,
            why = refused => Err(why),
        };
        sent.with_context(|| format!("cannot send data to volume {name}"))?;
        writer
            .finish()
            .await
            .map_err(stream_failure)
            .with_context(|| format!("cannot close volume {name}"))
    })
}

/// Where the next data (or hole) ends, and whether it is data.
fn run_at(file: &File, at: u64) -> std::io::Result<(bool, u64)> {
    let seek = |whence| {
        let offset = i64::try_from(at).unwrap_or(i64::MAX);
        // SAFETY: moves the descriptor's position only.
        let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        u64::try_from(found).map_err(|_| std::io::Error::last_os_error())
    };
    match seek(libc::SEEK_DATA) {
        Ok(data) if data > at => Ok((false, data)),
        Ok(_) => Ok((true, seek(libc::SEEK_HOLE)?)),
        // Nothing but a hole up to the end.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            Ok((false, file.metadata()?.len()))
        }
        Err(error) => Err(error),
    }
}

/// All of the file: what does not fit is for the daemon to refuse, not to be left out unseen.
async fn send(file: &mut File, path: &str, sparse: bool, writer: &StreamWriter) -> Result {
    let cannot = |error: std::io::Error| local("read", path, &error);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        let mut left = u64::MAX;
        if sparse {
            let (data, end) = run_at(file, at).map_err(cannot)?;
            let run = end - at;
            if run == 0 {
                break;
            }
            if !data {
                writer.hole(run).await.map_err(stream_failure)?;
                at += run;
                continue;
            }
            left = run;
            file.seek(SeekFrom::Start(at)).map_err(cannot)?;
        }
        let want = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let got = file.read(&mut buffer[..want]).map_err(cannot)?;
        if got == 0 {
            break;
        }
        writer.write(&buffer[..got]).await.map_err(stream_failure)?;
        at += got as u64;
    }
    Ok(())
}

fn download(shell: &mut Shell, args: &Args) -> Result {
    let (offset, length) = (
        args.number("offset")?.unwrap_or(0),
        args.number("length")?.unwrap_or(0),
    );
    let vol = find(shell, args, By::Any)?;
    let path = args.required("file")?;
    let name = vol.name.clone();
    let asked = StorageVolDownloadArgs {
        vol,
        offset,
        length,
        flags: if args.has("sparse") { SPARSE } else { 0 },
    };
    let created = OpenOptions::new().write(true).create_new(true).open(path);
    let new = created.is_ok();
    let file = created
        .or_else(|_| OpenOptions::new().write(true).truncate(true).open(path))
        .map_err(|error| local("create", path, &error))?;
    let connection = shell.connection()?;
    let received = connection
        .check_access(procs::STORAGE_VOL_DOWNLOAD.number())
        .and_then(|()| {
            connection.run(async |client: Client| {
                // What is not asked for does not come.
                let ((), stream) = client
                    .call_sparse_stream(procs::STORAGE_VOL_DOWNLOAD, &asked)
                    .await
                    .map_err(connection::failure)
                    .with_context(|| format!("cannot download from volume {name}"))?;
                receive(file, path, stream)
                    .await
                    .with_context(|| format!("cannot receive data from volume {name}"))
            })
        });
    if received.is_err() && new {
        // What is there of it is of no use; that it failed is told already.
        let _ = fs::remove_file(path);
    }
    received
}

async fn receive(mut file: File, path: &str, stream: Stream) -> Result {
    let Stream { mut reader, writer } = stream;
    let cannot = |error: std::io::Error| local("write", path, &error);
    let mut end = 0;
    loop {
        match reader.next().await.map_err(stream_failure)? {
            Some(StreamEvent::Data(data)) => {
                file.write_all(&data).map_err(cannot)?;
                end += data.len() as u64;
            }
            Some(StreamEvent::Hole(len)) => {
                end += len;
                file.seek(SeekFrom::Start(end)).map_err(cannot)?;
            }
            Some(StreamEvent::EndOfData | StreamEvent::Finish) | None => break,
        }
    }
    if file.metadata().map_err(cannot)?.is_file() {
        // A hole at the end makes the file longer, too.
        file.set_len(end).map_err(cannot)?;
    }
    writer.finish().await.map_err(stream_failure)
}
