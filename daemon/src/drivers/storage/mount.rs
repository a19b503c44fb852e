//! Mounting what a pool is on, and asking servers what they export.

use std::fs;
use std::time::Duration;

use xml_schemas::pool::{Host, Pool, PoolType, Source};

use super::command::{must, run};
use super::{error, system};
use crate::error::{ErrorCode, Result};

/// For a server to answer.
const MOUNT_LIMIT: Duration = Duration::from_secs(60);
/// For a file system to be given back.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(60);
/// For a server to say what it has.
const EXPORTS_LIMIT: Duration = Duration::from_secs(30);
/// For a file system to be made.
const FORMAT_LIMIT: Duration = Duration::from_secs(600);

/// What is mounted, as mount(8) takes it.
fn device(pool: &Pool) -> String {
    match pool.kind {
        PoolType::Netfs => {
            let host = pool.source.hosts.first().map_or("", |h| h.name.as_str());
            // An IPv6 address would be taken for a host with a path.
            let host = if host.contains(':') && !host.starts_with('[') {
                format!("[{host}]")
            } else {
                host.to_owned()
            };
            let dir = pool.source.dir.as_deref().unwrap_or("/");
            match pool.source.format.as_deref() {
                Some("cifs") => format!("//{host}{dir}"),
                _ => format!("{host}:{dir}"),
            }
        }
        PoolType::Dir | PoolType::Fs => pool.source.devices.first().cloned().unwrap_or_default(),
    }
}

/// Undoes the kernel's escapes of blanks.
fn unescape(field: &str) -> String {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// What is mounted at a path, if anything is: by the kernel's list, which answers whatever a
/// server does. Of several the last.
fn mounted(path: &str) -> Result<Option<String>> {
    let list = fs::read_to_string("/proc/self/mounts")
        .map_err(|e| system("cannot read /proc/self/mounts", &e))?;
    Ok(list
        .lines()
        .rev()
        .map(|line| line.split(' ').map(unescape))
        .find_map(|mut fields| {
            let (device, at) = (fields.next()?, fields.next()?);
            (at == path).then_some(device)
        }))
}

/// Whether a pool's file system is mounted; `dir` pools have none of their own.
///
/// # Errors
/// The system's.
pub fn is_mounted(pool: &Pool) -> Result<bool> {
    if pool.kind == PoolType::Dir {
        return Ok(true);
    }
    let wanted = device(pool);
    Ok(mounted(&pool.path)?.is_some_and(|device| {
        device == wanted || (pool.kind == PoolType::Fs && same_device(&device, &wanted))
    }))
}

/// Two names of a block device (`/dev/disk/by-uuid/…`).
fn same_device(one: &str, other: &str) -> bool {
    match (fs::canonicalize(one), fs::canonicalize(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// Mounts a pool's file system, unless it is.
///
/// # Errors
/// What mount(8) says, or that it took too long.
pub fn mount(pool: &Pool) -> Result<()> {
    if is_mounted(pool)? {
        return Ok(());
    }
    let mut options = vec!["nodev".to_owned(), "nosuid".to_owned(), "noexec".to_owned()];
    let format = pool.source.format.as_deref();
    let kind = match (pool.kind, format) {
        (PoolType::Netfs, None | Some("auto")) => None,
        (PoolType::Fs, None) => Some("auto"),
        (_, format) => format,
    };
    if format == Some("glusterfs") {
        options.push("direct-io-mode=1".to_owned());
    }
    if format == Some("cifs") {
        options.push("guest".to_owned());
    }
    if let Some(version) = &pool.source.protocol_version {
        options.push(format!("nfsvers={version}"));
    }
    if let Some(port) = pool.source.hosts.first().and_then(|host| host.port) {
        options.push(format!("port={port}"));
    }
    options.extend(pool.mount_options.iter().cloned());
    let options = options.join(",");
    let device = device(pool);
    if device.starts_with('-') {
        return Err(error(
            ErrorCode::INVALID_ARG,
            format!("'{device}' cannot be mounted"),
        ));
    }
    let mut args = vec!["-o", options.as_str()];
    if let Some(kind) = kind {
        args.extend(["-t", kind]);
    }
    args.extend([device.as_str(), pool.path.as_str()]);
    must("mount", &args, MOUNT_LIMIT)?;
    Ok(())
}

/// Gives a pool's file system back, if it is mounted.
///
/// # Errors
/// What umount(8) says, or that it took too long.
pub fn unmount(pool: &Pool) -> Result<()> {
    if pool.kind == PoolType::Dir || !is_mounted(pool)? {
        return Ok(());
    }
    must("umount", &[&pool.path], UNMOUNT_LIMIT)?;
    Ok(())
}

/// Makes a file system on the pool's device.
///
/// # Errors
/// VIR_ERR_STORAGE_POOL_BUILT if there is something already and it is not to be overwritten.
pub fn format(pool: &Pool, overwrite: bool) -> Result<()> {
    let Some(device) = pool
        .source
        .devices
        .first()
        .filter(|_| pool.kind == PoolType::Fs)
    else {
        return Err(error(
            ErrorCode::OPERATION_INVALID,
            format!(
                "No source device specified when formatting pool '{}'",
                pool.name
            ),
        ));
    };
    if !device.starts_with('/') {
        return Err(error(
            ErrorCode::OPERATION_INVALID,
            format!(
                "Source device does not exist when formatting pool '{}'",
                pool.name
            ),
        ));
    }
    let format = match pool.source.format.as_deref() {
        Some(format) if format != "auto" => format,
        _ => {
            return Err(error(
                ErrorCode::OPERATION_INVALID,
                format!("pool '{}' names no format to make: auto is none", pool.name),
            ));
        }
    };
    if !overwrite {
        // 2: it found nothing that it knows.
        let said = run("blkid", &["-p", device], FORMAT_LIMIT)?;
        match said.status.code() {
            Some(2) => {}
            Some(0) => {
                return Err(error(
                    ErrorCode::STORAGE_POOL_BUILT,
                    format!(
                        "Format of device '{device}' is known already: {}",
                        said.out.trim()
                    ),
                ));
            }
            _ => {
                return Err(error(
                    ErrorCode::STORAGE_PROBE_FAILED,
                    format!(
                        "Failed to probe for format of device '{device}': {}",
                        said.err.trim()
                    ),
                ));
            }
        }
    }
    let mut args = vec!["-t", format];
    match format {
        "xfs" => args.push("-f"),
        // On a whole disk, too.
        "vfat" => args.push("-I"),
        "ext2" | "ext3" | "ext4" => args.extend(["-F", "-q"]),
        _ => {}
    }
    args.push(device);
    must("mkfs", &args, FORMAT_LIMIT).map_err(|cause| {
        error(
            ErrorCode::OPERATION_FAILED,
            format!(
                "Failed to make filesystem of type '{format}' on device '{device}': {}",
                cause.message
            ),
        )
    })?;
    Ok(())
}

/// The folders that a server exports.
///
/// # Errors
/// What showmount(8) says.
pub fn exports(host: &Host) -> Result<Vec<Source>> {
    if host.name.starts_with('-') {
        return Err(error(
            ErrorCode::INVALID_ARG,
            format!("'{}' is no host", host.name),
        ));
    }
    let said = run(
        "showmount",
        &["--no-headers", "--exports", &host.name],
        EXPORTS_LIMIT,
    )?;
    if !said.status.success() {
        log::info!("showmount of {}: {}", host.name, said.err.trim());
        return Ok(Vec::new());
    }
    let folders = said.out.lines().filter_map(|line| {
        // `/exports/a  192.0.2.0/24`: who may mount it stands behind the last blanks.
        let end = line.rfind(' ').unwrap_or(line.len());
        let dir = line[..end].trim_end();
        dir.starts_with('/').then(|| dir.to_owned())
    });
    Ok(folders
        .map(|dir| Source {
            hosts: vec![host.clone()],
            dir: Some(dir),
            format: Some("nfs".to_owned()),
            ..Source::default()
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_is_read() {
        assert_eq!(unescape("/a\\040b\\134"), "/a b\\");
        assert_eq!(unescape("/x\\04"), "/x\\04");
        assert!(mounted("/proc").unwrap().is_some());
        assert_eq!(mounted("/no/such/mount").unwrap(), None);
    }
}
