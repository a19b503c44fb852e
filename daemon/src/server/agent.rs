//! What the guest's agent is asked for. Everything it says is the guest's word, and bounded.

use std::sync::Arc;

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::TypedParam;
use serde_json::{Value, json};
use xml_schemas::cpuset;
use xml_schemas::domain::device::{Disk, PciAddress};

use super::{Answer, Call, Daemon};
use crate::drivers::domain::guest_info::{self, Filesystem};
use crate::drivers::domain::{agent, blocking};
use crate::error::{Error, check_flags};

/// The functions that need an agent.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_QEMU_AGENT_COMMAND, command)
        .on(
            procs::DOMAIN_AGENT_SET_RESPONSE_TIMEOUT,
            set_response_timeout,
        )
        .on(procs::DOMAIN_GET_TIME, get_time)
        .on(procs::DOMAIN_SET_TIME, set_time)
        .on(procs::DOMAIN_GET_HOSTNAME, get_hostname)
        .on(procs::DOMAIN_GET_GUEST_INFO, get_guest_info)
        .on(procs::DOMAIN_GET_FSINFO, get_fsinfo)
        .on(procs::DOMAIN_FSFREEZE, fsfreeze)
        .on(procs::DOMAIN_FSTHAW, fsthaw)
        .on(procs::DOMAIN_FSTRIM, fstrim)
        .on(procs::DOMAIN_SET_USER_PASSWORD, set_user_password)
        .on(procs::DOMAIN_AUTHORIZED_SSH_KEYS_GET, ssh_keys_get)
        .on(procs::DOMAIN_AUTHORIZED_SSH_KEYS_SET, ssh_keys_set)
        .on(procs::DOMAIN_GET_GUEST_VCPUS, get_guest_vcpus)
        .on(procs::DOMAIN_SET_GUEST_VCPUS, set_guest_vcpus)
}

fn malformed(what: &str) -> RemoteError {
    Error::internal(format!("the guest agent's answer makes no sense: {what}")).into()
}

async fn command(
    call: Call,
    args: QemuDomainAgentCommandArgs,
) -> Answer<QemuDomainAgentCommandRet> {
    check_flags(args.flags, 0, "qemuDomainQemuAgentCommand")?;
    let domain = call.state().find(&args.dom)?;
    // Before the command, as libvirt: whoever has no agent to ask hears that.
    domain.agent_there()?;
    let parsed: Result<Value, _> = serde_json::from_str(&args.cmd);
    if let Err(error) = parsed {
        let text = format!("cannot parse json {}: {error}", args.cmd);
        return Err(Error::internal(text).into());
    }
    // One line: a line end inside would begin another command.
    let line = agent::compact(args.cmd.as_bytes())?;
    let answer = domain.agent_line(line, Some(args.timeout)).await?;
    Ok(QemuDomainAgentCommandRet {
        result: Some(agent::compact(&answer)?),
    })
}

async fn set_response_timeout(
    call: Call,
    args: DomainAgentSetResponseTimeoutArgs,
) -> Answer<DomainAgentSetResponseTimeoutRet> {
    check_flags(args.flags, 0, "qemuDomainAgentSetResponseTimeout")?;
    agent::limit(args.timeout)?;
    let domain = call.state().find(&args.dom)?;
    call.state()
        .domains
        .set_agent_timeout(&domain, args.timeout);
    Ok(DomainAgentSetResponseTimeoutRet { result: 0 })
}

async fn get_time(call: Call, args: DomainGetTimeArgs) -> Answer<DomainGetTimeRet> {
    check_flags(args.flags, 0, "qemuDomainGetTime")?;
    let domain = call.state().find(&args.dom)?;
    let time = domain.agent_command("guest-get-time", None).await?;
    let time = time.as_i64().ok_or_else(|| malformed("the time"))?;
    Ok(DomainGetTimeRet {
        seconds: time.div_euclid(1_000_000_000),
        nseconds: u32::try_from(time.rem_euclid(1_000_000_000)).unwrap_or(0),
    })
}

async fn set_time(call: Call, args: DomainSetTimeArgs) -> Answer<()> {
    /// VIR_DOMAIN_TIME_SYNC
    const SYNC: u32 = 1;
    check_flags(args.flags, SYNC, "qemuDomainSetTime")?;
    let domain = call.state().find(&args.dom)?;
    let arguments = if args.flags & SYNC != 0 {
        None
    } else {
        let time = args
            .seconds
            .checked_mul(1_000_000_000)
            .and_then(|time| time.checked_add(args.nseconds.into()));
        let time = time.ok_or_else(|| {
            let text = format!("Time '{}' is too big for guest agent", args.seconds);
            RemoteError::from(Error::new(ErrorCode::INVALID_ARG, text))
        })?;
        Some(json!({ "time": time }))
    };
    domain.agent_command("guest-set-time", arguments).await?;
    Ok(())
}

async fn get_hostname(call: Call, args: DomainGetHostnameArgs) -> Answer<DomainGetHostnameRet> {
    /// virDomainGetHostnameFlags
    const LEASE: u32 = 1;
    const AGENT: u32 = 2;
    check_flags(args.flags, LEASE | AGENT, "qemuDomainGetHostname")?;
    let domain = call.state().find(&args.dom)?;
    if args.flags == LEASE | AGENT {
        let text = "flags 'VIR_DOMAIN_GET_HOSTNAME_LEASE' and 'VIR_DOMAIN_GET_HOSTNAME_AGENT' in \
                    qemuDomainGetHostname are mutually exclusive";
        return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
    }
    if args.flags == LEASE {
        let definition = Arc::clone(&domain.lock().live()?.definition);
        let domains = Arc::clone(&call.state().domains);
        let found = blocking(move || domains.leased_name(&definition)).await??;
        let hostname = found.ok_or_else(|| {
            let text = format!("no hostname found for domain {}", domain.name().name);
            Error::new(ErrorCode::NO_HOSTNAME, text)
        })?;
        return Ok(DomainGetHostnameRet { hostname });
    }
    let answer = domain.agent_command("guest-get-host-name", None).await?;
    let name = answer.get("host-name").and_then(Value::as_str);
    Ok(DomainGetHostnameRet {
        hostname: name.ok_or_else(|| malformed("the host name"))?.to_owned(),
    })
}

/// Targets of the disks that a file system is on, found by what the agent says of their places.
fn targets(definition: &xml_schemas::Domain, filesystem: &Filesystem) -> Vec<String> {
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    let disks: Vec<(Option<PciAddress>, String)> = disks
        .filter_map(|e| {
            let target = Disk::read(e).ok()?.target;
            Some((PciAddress::of(e).ok().flatten(), target))
        })
        .collect();
    let find = |place: &guest_info::Place| {
        disks.iter().find(|(address, _)| {
            address.as_ref().is_some_and(|a| {
                (u32::from(a.bus), u32::from(a.slot), u32::from(a.function))
                    == (place.bus, place.slot, place.function)
            })
        })
    };
    let places = filesystem
        .disks
        .iter()
        .filter_map(|disk| disk.controller.as_ref());
    places
        .filter_map(find)
        .map(|(_, target)| target.clone())
        .collect()
}

async fn get_guest_info(call: Call, args: DomainGetGuestInfoArgs) -> Answer<DomainGetGuestInfoRet> {
    check_flags(args.flags, 0, "qemuDomainGetGuestInfo")?;
    let unknown = args.types & !guest_info::ALL;
    if unknown != 0 {
        let text = format!("unsupported guest information types '0x{unknown:x}'");
        return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
    }
    let domain = call.state().find(&args.dom)?;
    let definition = std::sync::Arc::clone(&domain.lock().live()?.definition);
    // What was not asked for by name may be missing in this agent.
    let asked = args.types != 0;
    let types = if asked { args.types } else { guest_info::ALL };
    let mut params: Vec<TypedParam> = Vec::new();
    for part in guest_info::PARTS {
        if types & part.bit == 0 {
            continue;
        }
        match domain.agent_command(part.command, None).await {
            Ok(answer) => {
                let find = |filesystem: &Filesystem| targets(&definition, filesystem);
                params.extend((part.params)(answer, &find)?);
            }
            Err(error) if asked || error.code != ErrorCode::INTERNAL_ERROR => {
                return Err(error.into());
            }
            Err(error) => log::debug!("{}: {error}", part.command),
        }
    }
    params.truncate(rpc::limits::GUEST_INFO_PARAMS_MAX);
    Ok(DomainGetGuestInfoRet {
        params: params.into(),
    })
}

async fn get_fsinfo(call: Call, args: DomainGetFsinfoArgs) -> Answer<DomainGetFsinfoRet> {
    check_flags(args.flags, 0, "qemuDomainGetFSInfo")?;
    let domain = call.state().find(&args.dom)?;
    let answer = domain.agent_command("guest-get-fsinfo", None).await?;
    let definition = std::sync::Arc::clone(&domain.lock().live()?.definition);
    let info: Vec<DomainFsinfo> = guest_info::filesystems(answer)?
        .into_iter()
        .take(256)
        .map(|filesystem| DomainFsinfo {
            dev_aliases: targets(&definition, &filesystem)
                .into_iter()
                .take(256)
                .collect(),
            mountpoint: filesystem.mountpoint,
            name: filesystem.name,
            fstype: filesystem.kind,
        })
        .collect();
    Ok(DomainGetFsinfoRet {
        ret: u32::try_from(info.len()).unwrap_or(0),
        info: info.into(),
    })
}

fn number(answer: &Value) -> Answer<i32> {
    let number = answer.as_i64().and_then(|n| i32::try_from(n).ok());
    number.ok_or_else(|| malformed("a number of file systems"))
}

async fn fsfreeze(call: Call, args: DomainFsfreezeArgs) -> Answer<DomainFsfreezeRet> {
    check_flags(args.flags, 0, "qemuDomainFSFreeze")?;
    let domain = call.state().find(&args.dom)?;
    let answer = if args.mountpoints.is_empty() {
        domain.agent_command("guest-fsfreeze-freeze", None).await?
    } else {
        let list = json!({ "mountpoints": args.mountpoints.0 });
        let command = "guest-fsfreeze-freeze-list";
        domain.agent_command(command, Some(list)).await?
    };
    Ok(DomainFsfreezeRet {
        filesystems: number(&answer)?,
    })
}

async fn fsthaw(call: Call, args: DomainFsthawArgs) -> Answer<DomainFsthawRet> {
    check_flags(args.flags, 0, "qemuDomainFSThaw")?;
    let domain = call.state().find(&args.dom)?;
    // The agent thaws all it has frozen; it takes no list.
    let answer = domain.agent_command("guest-fsfreeze-thaw", None).await?;
    Ok(DomainFsthawRet {
        filesystems: number(&answer)?,
    })
}

async fn fstrim(call: Call, args: DomainFstrimArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuDomainFSTrim")?;
    let domain = call.state().find(&args.dom)?;
    if args.mount_point.is_some() {
        let text = "Specifying mount point is not supported for now";
        return Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into());
    }
    let minimum = json!({ "minimum": args.minimum });
    domain.agent_command("guest-fstrim", Some(minimum)).await?;
    Ok(())
}

async fn set_user_password(call: Call, args: DomainSetUserPasswordArgs) -> Answer<()> {
    /// VIR_DOMAIN_PASSWORD_ENCRYPTED
    const ENCRYPTED: u32 = 1;
    check_flags(args.flags, ENCRYPTED, "qemuDomainSetUserPassword")?;
    let domain = call.state().find(&args.dom)?;
    let arguments = json!({
        "crypted": args.flags & ENCRYPTED != 0,
        "username": args.user.unwrap_or_default(),
        "password": guest_info::base64(args.password.unwrap_or_default().as_bytes()),
    });
    let command = "guest-set-user-password";
    domain.agent_command(command, Some(arguments)).await?;
    Ok(())
}

async fn ssh_keys_get(
    call: Call,
    args: DomainAuthorizedSshKeysGetArgs,
) -> Answer<DomainAuthorizedSshKeysGetRet> {
    check_flags(args.flags, 0, "qemuDomainAuthorizedSSHKeysGet")?;
    let domain = call.state().find(&args.dom)?;
    let user = json!({ "username": args.user });
    let command = "guest-ssh-get-authorized-keys";
    let answer = domain.agent_command(command, Some(user)).await?;
    let keys = answer.get("keys").and_then(Value::as_array);
    let keys = keys.ok_or_else(|| malformed("the keys"))?;
    let text = |key: &Value| key.as_str().map(str::to_owned);
    Ok(DomainAuthorizedSshKeysGetRet {
        keys: keys.iter().filter_map(text).take(2048).collect(),
    })
}

async fn ssh_keys_set(call: Call, args: DomainAuthorizedSshKeysSetArgs) -> Answer<()> {
    /// virDomainAuthorizedSSHKeysSetFlags
    const APPEND: u32 = 1;
    const REMOVE: u32 = 2;
    check_flags(
        args.flags,
        APPEND | REMOVE,
        "qemuDomainAuthorizedSSHKeysSet",
    )?;
    let domain = call.state().find(&args.dom)?;
    let mut arguments = json!({ "username": args.user, "keys": args.keys.0 });
    let command = if args.flags & REMOVE != 0 {
        "guest-ssh-remove-authorized-keys"
    } else {
        arguments["reset"] = json!(args.flags & APPEND == 0);
        "guest-ssh-add-authorized-keys"
    };
    domain.agent_command(command, Some(arguments)).await?;
    Ok(())
}

async fn get_guest_vcpus(
    call: Call,
    args: DomainGetGuestVcpusArgs,
) -> Answer<DomainGetGuestVcpusRet> {
    check_flags(args.flags, 0, "qemuDomainGetGuestVcpus")?;
    let domain = call.state().find(&args.dom)?;
    let vcpus = guest_info::vcpus(domain.agent_command("guest-get-vcpus", None).await?)?;
    let set = |keep: fn(&guest_info::GuestVcpu) -> bool| {
        let kept = vcpus.iter().filter(|vcpu| keep(vcpu));
        cpuset::format(&kept.map(|vcpu| vcpu.id).collect())
    };
    let params = vec![
        TypedParam::new("vcpus", set(|_| true)),
        TypedParam::new("online", set(|vcpu| vcpu.online)),
        TypedParam::new("offlinable", set(|vcpu| vcpu.can_offline)),
    ];
    Ok(DomainGetGuestVcpusRet {
        params: params.into(),
    })
}

async fn set_guest_vcpus(call: Call, args: DomainSetGuestVcpusArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuDomainSetGuestVcpus")?;
    let invalid = |text: String| RemoteError::from(Error::new(ErrorCode::INVALID_ARG, text));
    let domain = call.state().find(&args.dom)?;
    let wanted = cpuset::parse(&args.cpumap)
        .ok_or_else(|| invalid(format!("Failed to parse bitmap '{}'", args.cpumap)))?;
    if !matches!(args.state, 0 | 1) {
        return Err(invalid("unsupported state value".into()));
    }
    let known = guest_info::vcpus(domain.agent_command("guest-get-vcpus", None).await?)?;
    for id in &wanted {
        let Some(vcpu) = known.iter().find(|vcpu| vcpu.id == *id) else {
            return Err(invalid(format!("guest is missing vCPUs '{id}'")));
        };
        if args.state == 0 && !vcpu.can_offline {
            return Err(invalid(format!("vCPU '{id}' can't be offlined")));
        }
    }
    super::vcpus::set_in_guest(&domain, wanted.into_iter(), args.state == 1).await?;
    Ok(())
}
