//! Snapshots and checkpoints: the arguments and answers of their procedures.

use crate::limits::LIST_MAX;
use crate::types::{Checkpoint, Domain, Snapshot};
use crate::xdr::{List, xdr_structs};

xdr_structs! {
    DomainSnapshotCreateXmlArgs {
        dom: Domain,
        xml_desc: String,
        flags: u32,
    }
    DomainSnapshotCreateXmlRet {
        snap: Snapshot,
    }
    DomainSnapshotGetXmlDescArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotGetXmlDescRet {
        xml: String,
    }
    DomainSnapshotNumArgs {
        dom: Domain,
        flags: u32,
    }
    DomainSnapshotNumRet {
        num: i32,
    }
    DomainSnapshotListNamesArgs {
        dom: Domain,
        maxnames: i32,
        flags: u32,
    }
    DomainSnapshotListNamesRet {
        names: List<String, LIST_MAX>,
    }
    DomainListAllSnapshotsArgs {
        dom: Domain,
        need_results: i32,
        flags: u32,
    }
    DomainListAllSnapshotsRet {
        snapshots: List<Snapshot, LIST_MAX>,
        ret: i32,
    }
    DomainSnapshotNumChildrenArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotNumChildrenRet {
        num: i32,
    }
    DomainSnapshotListChildrenNamesArgs {
        snap: Snapshot,
        maxnames: i32,
        flags: u32,
    }
    DomainSnapshotListChildrenNamesRet {
        names: List<String, LIST_MAX>,
    }
    DomainSnapshotListAllChildrenArgs {
        snapshot: Snapshot,
        need_results: i32,
        flags: u32,
    }
    DomainSnapshotListAllChildrenRet {
        snapshots: List<Snapshot, LIST_MAX>,
        ret: i32,
    }
    DomainSnapshotLookupByNameArgs {
        dom: Domain,
        name: String,
        flags: u32,
    }
    DomainSnapshotLookupByNameRet {
        snap: Snapshot,
    }
    DomainHasCurrentSnapshotArgs {
        dom: Domain,
        flags: u32,
    }
    DomainHasCurrentSnapshotRet {
        result: i32,
    }
    DomainSnapshotGetParentArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotGetParentRet {
        snap: Snapshot,
    }
    DomainSnapshotCurrentArgs {
        dom: Domain,
        flags: u32,
    }
    DomainSnapshotCurrentRet {
        snap: Snapshot,
    }
    DomainSnapshotIsCurrentArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotIsCurrentRet {
        current: i32,
    }
    DomainSnapshotHasMetadataArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotHasMetadataRet {
        metadata: i32,
    }
    DomainRevertToSnapshotArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainSnapshotDeleteArgs {
        snap: Snapshot,
        flags: u32,
    }
    DomainCheckpointCreateXmlArgs {
        dom: Domain,
        xml_desc: String,
        flags: u32,
    }
    DomainCheckpointCreateXmlRet {
        checkpoint: Checkpoint,
    }
    DomainCheckpointGetXmlDescArgs {
        checkpoint: Checkpoint,
        flags: u32,
    }
    DomainCheckpointGetXmlDescRet {
        xml: String,
    }
    DomainListAllCheckpointsArgs {
        dom: Domain,
        need_results: i32,
        flags: u32,
    }
    DomainListAllCheckpointsRet {
        checkpoints: List<Checkpoint, LIST_MAX>,
        ret: i32,
    }
    DomainCheckpointListAllChildrenArgs {
        checkpoint: Checkpoint,
        need_results: i32,
        flags: u32,
    }
    DomainCheckpointListAllChildrenRet {
        checkpoints: List<Checkpoint, LIST_MAX>,
        ret: i32,
    }
    DomainCheckpointLookupByNameArgs {
        dom: Domain,
        name: String,
        flags: u32,
    }
    DomainCheckpointLookupByNameRet {
        checkpoint: Checkpoint,
    }
    DomainCheckpointGetParentArgs {
        checkpoint: Checkpoint,
        flags: u32,
    }
    DomainCheckpointGetParentRet {
        parent: Checkpoint,
    }
    DomainCheckpointDeleteArgs {
        checkpoint: Checkpoint,
        flags: u32,
    }
}
