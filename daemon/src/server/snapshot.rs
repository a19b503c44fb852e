//! Snapshots.

use rpc::args::*;
use rpc::error::ErrorCode;
use rpc::procs;
use rpc::server::Router;
use rpc::types;

use super::{Answer, Call, Daemon, count};
use crate::error::{Error, check_flags};

/// The functions about snapshots.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_SNAPSHOT_CREATE_XML, create)
        .on(procs::DOMAIN_SNAPSHOT_GET_XML_DESC, xml)
        .on(procs::DOMAIN_SNAPSHOT_NUM, number)
        .on(procs::DOMAIN_SNAPSHOT_LIST_NAMES, names)
        .on(procs::DOMAIN_LIST_ALL_SNAPSHOTS, list)
        .on(procs::DOMAIN_SNAPSHOT_NUM_CHILDREN, children_number)
        .on(procs::DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES, children_names)
        .on(procs::DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN, children)
        .on(procs::DOMAIN_SNAPSHOT_LOOKUP_BY_NAME, lookup)
        .on(procs::DOMAIN_HAS_CURRENT_SNAPSHOT, has_current)
        .on(procs::DOMAIN_SNAPSHOT_GET_PARENT, parent)
        .on(procs::DOMAIN_SNAPSHOT_CURRENT, current)
        .on(procs::DOMAIN_SNAPSHOT_IS_CURRENT, is_current)
        .on(procs::DOMAIN_SNAPSHOT_HAS_METADATA, has_metadata)
        .on(procs::DOMAIN_REVERT_TO_SNAPSHOT, revert)
        .on(procs::DOMAIN_SNAPSHOT_DELETE, delete)
}

fn reference(name: impl Into<String>, dom: &types::Domain) -> types::Snapshot {
    types::Snapshot {
        name: name.into(),
        dom: dom.clone(),
    }
}

async fn create(
    call: Call,
    args: DomainSnapshotCreateXmlArgs,
) -> Answer<DomainSnapshotCreateXmlRet> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let name = domains
        .create_snapshot(domain, args.xml_desc, args.flags)
        .await?;
    Ok(DomainSnapshotCreateXmlRet {
        snap: reference(name, &args.dom),
    })
}

async fn xml(
    call: Call,
    args: DomainSnapshotGetXmlDescArgs,
) -> Answer<DomainSnapshotGetXmlDescRet> {
    /// VIR_DOMAIN_SNAPSHOT_XML_SECURE
    const SECURE: u32 = 1;
    check_flags(args.flags, SECURE, "qemuDomainSnapshotGetXMLDesc")?;
    let domain = call.state().find(&args.snap.dom)?;
    let snapshot = call.state().domains.snapshot(&domain, &args.snap.name)?;
    Ok(DomainSnapshotGetXmlDescRet {
        xml: snapshot.format(true),
    })
}

fn all(call: &Call, dom: &types::Domain, after: Option<&str>, flags: u32) -> Answer<Vec<String>> {
    let domain = call.state().find(dom)?;
    Ok(call.state().domains.list_snapshots(&domain, after, flags)?)
}

fn some(names: Vec<String>, most: i32) -> Vec<String> {
    let most = usize::try_from(most).unwrap_or(0);
    names.into_iter().take(most).collect()
}

fn references(
    names: Vec<String>,
    dom: &types::Domain,
    need_results: i32,
) -> (Vec<types::Snapshot>, i32) {
    let number = count(names.len());
    let list = match need_results {
        0 => Vec::new(),
        _ => names.into_iter().map(|name| reference(name, dom)).collect(),
    };
    (list, number)
}

async fn number(call: Call, args: DomainSnapshotNumArgs) -> Answer<DomainSnapshotNumRet> {
    let num = count(all(&call, &args.dom, None, args.flags)?.len());
    Ok(DomainSnapshotNumRet { num })
}

async fn names(
    call: Call,
    args: DomainSnapshotListNamesArgs,
) -> Answer<DomainSnapshotListNamesRet> {
    let names = all(&call, &args.dom, None, args.flags)?;
    Ok(DomainSnapshotListNamesRet {
        names: some(names, args.maxnames).into(),
    })
}

async fn list(call: Call, args: DomainListAllSnapshotsArgs) -> Answer<DomainListAllSnapshotsRet> {
    let names = all(&call, &args.dom, None, args.flags)?;
    let (snapshots, ret) = references(names, &args.dom, args.need_results);
    Ok(DomainListAllSnapshotsRet {
        snapshots: snapshots.into(),
        ret,
    })
}

async fn children_number(
    call: Call,
    args: DomainSnapshotNumChildrenArgs,
) -> Answer<DomainSnapshotNumChildrenRet> {
    let names = all(&call, &args.snap.dom, Some(&args.snap.name), args.flags)?;
    Ok(DomainSnapshotNumChildrenRet {
        num: count(names.len()),
    })
}

async fn children_names(
    call: Call,
    args: DomainSnapshotListChildrenNamesArgs,
) -> Answer<DomainSnapshotListChildrenNamesRet> {
    let names = all(&call, &args.snap.dom, Some(&args.snap.name), args.flags)?;
    Ok(DomainSnapshotListChildrenNamesRet {
        names: some(names, args.maxnames).into(),
    })
}

async fn children(
    call: Call,
    args: DomainSnapshotListAllChildrenArgs,
) -> Answer<DomainSnapshotListAllChildrenRet> {
    let of = &args.snapshot;
    let names = all(&call, &of.dom, Some(&of.name), args.flags)?;
    let (snapshots, ret) = references(names, &of.dom, args.need_results);
    Ok(DomainSnapshotListAllChildrenRet {
        snapshots: snapshots.into(),
        ret,
    })
}

async fn lookup(
    call: Call,
    args: DomainSnapshotLookupByNameArgs,
) -> Answer<DomainSnapshotLookupByNameRet> {
    check_flags(args.flags, 0, "qemuDomainSnapshotLookupByName")?;
    let domain = call.state().find(&args.dom)?;
    call.state().domains.snapshot(&domain, &args.name)?;
    Ok(DomainSnapshotLookupByNameRet {
        snap: reference(args.name, &args.dom),
    })
}

async fn has_current(
    call: Call,
    args: DomainHasCurrentSnapshotArgs,
) -> Answer<DomainHasCurrentSnapshotRet> {
    check_flags(args.flags, 0, "qemuDomainHasCurrentSnapshot")?;
    let domain = call.state().find(&args.dom)?;
    let current = call.state().domains.current_snapshot(&domain)?;
    Ok(DomainHasCurrentSnapshotRet {
        result: i32::from(current.is_some()),
    })
}

async fn parent(
    call: Call,
    args: DomainSnapshotGetParentArgs,
) -> Answer<DomainSnapshotGetParentRet> {
    check_flags(args.flags, 0, "qemuDomainSnapshotGetParent")?;
    let domain = call.state().find(&args.snap.dom)?;
    let domains = &call.state().domains;
    let parent = domains.snapshot_parent(&domain, &args.snap.name)?;
    Ok(DomainSnapshotGetParentRet {
        snap: reference(parent, &args.snap.dom),
    })
}

async fn current(call: Call, args: DomainSnapshotCurrentArgs) -> Answer<DomainSnapshotCurrentRet> {
    check_flags(args.flags, 0, "qemuDomainSnapshotCurrent")?;
    let domain = call.state().find(&args.dom)?;
    let current = call.state().domains.current_snapshot(&domain)?;
    let name = current.ok_or_else(|| {
        Error::new(
            ErrorCode::NO_DOMAIN_SNAPSHOT,
            "the domain does not have a current snapshot",
        )
    })?;
    Ok(DomainSnapshotCurrentRet {
        snap: reference(name, &args.dom),
    })
}

async fn is_current(
    call: Call,
    args: DomainSnapshotIsCurrentArgs,
) -> Answer<DomainSnapshotIsCurrentRet> {
    check_flags(args.flags, 0, "qemuDomainSnapshotIsCurrent")?;
    let domain = call.state().find(&args.snap.dom)?;
    let domains = &call.state().domains;
    domains.snapshot(&domain, &args.snap.name)?;
    let current = domains.current_snapshot(&domain)?;
    Ok(DomainSnapshotIsCurrentRet {
        current: i32::from(current.as_deref() == Some(&args.snap.name)),
    })
}

/// Every snapshot here has.
async fn has_metadata(
    call: Call,
    args: DomainSnapshotHasMetadataArgs,
) -> Answer<DomainSnapshotHasMetadataRet> {
    check_flags(args.flags, 0, "qemuDomainSnapshotHasMetadata")?;
    let domain = call.state().find(&args.snap.dom)?;
    call.state().domains.snapshot(&domain, &args.snap.name)?;
    Ok(DomainSnapshotHasMetadataRet { metadata: 1 })
}

async fn revert(call: Call, args: DomainRevertToSnapshotArgs) -> Answer<()> {
    let domain = call.state().pin(&args.snap.dom)?;
    let domains = &call.state().domains;
    Ok(domains.revert(domain, args.snap.name, args.flags).await?)
}

async fn delete(call: Call, args: DomainSnapshotDeleteArgs) -> Answer<()> {
    let domain = call.state().pin(&args.snap.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .delete_snapshot(domain, args.snap.name, args.flags)
        .await?)
}
