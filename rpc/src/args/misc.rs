//! Secrets, network filters and host interfaces: the arguments and answers of their procedures.

use crate::limits::SECRET_VALUE_MAX;
use crate::types::{Interface, NwFilter, NwFilterBinding, Secret};
use crate::xdr::{Opaque, Uuid, xdr_structs};

xdr_structs! {
    NwfilterLookupByUuidArgs {
        uuid: Uuid,
    }
    NwfilterLookupByUuidRet {
        nwfilter: NwFilter,
    }
    NwfilterLookupByNameArgs {
        name: String,
    }
    NwfilterLookupByNameRet {
        nwfilter: NwFilter,
    }
    NwfilterDefineXmlArgs {
        xml: String,
    }
    NwfilterDefineXmlRet {
        nwfilter: NwFilter,
    }
    NwfilterDefineXmlFlagsArgs {
        xml: String,
        flags: u32,
    }
    NwfilterDefineXmlFlagsRet {
        nwfilter: NwFilter,
    }
    NwfilterUndefineArgs {
        nwfilter: NwFilter,
    }
    NwfilterGetXmlDescArgs {
        nwfilter: NwFilter,
        flags: u32,
    }
    NwfilterGetXmlDescRet {
        xml: String,
    }
    InterfaceLookupByNameArgs {
        name: String,
    }
    InterfaceLookupByNameRet {
        iface: Interface,
    }
    InterfaceLookupByMacStringArgs {
        mac: String,
    }
    InterfaceLookupByMacStringRet {
        iface: Interface,
    }
    InterfaceGetXmlDescArgs {
        iface: Interface,
        flags: u32,
    }
    InterfaceGetXmlDescRet {
        xml: String,
    }
    InterfaceDefineXmlArgs {
        xml: String,
        flags: u32,
    }
    InterfaceDefineXmlRet {
        iface: Interface,
    }
    InterfaceUndefineArgs {
        iface: Interface,
    }
    InterfaceCreateArgs {
        iface: Interface,
        flags: u32,
    }
    InterfaceDestroyArgs {
        iface: Interface,
        flags: u32,
    }
    InterfaceChangeBeginArgs {
        flags: u32,
    }
    InterfaceChangeCommitArgs {
        flags: u32,
    }
    InterfaceChangeRollbackArgs {
        flags: u32,
    }
    SecretLookupByUuidArgs {
        uuid: Uuid,
    }
    SecretLookupByUuidRet {
        secret: Secret,
    }
    SecretDefineXmlArgs {
        xml: String,
        flags: u32,
    }
    SecretDefineXmlRet {
        secret: Secret,
    }
    SecretGetXmlDescArgs {
        secret: Secret,
        flags: u32,
    }
    SecretGetXmlDescRet {
        xml: String,
    }
    SecretSetValueArgs {
        secret: Secret,
        value: Opaque<SECRET_VALUE_MAX>,
        flags: u32,
    }
    SecretGetValueArgs {
        secret: Secret,
        flags: u32,
    }
    SecretGetValueRet {
        value: Opaque<SECRET_VALUE_MAX>,
    }
    SecretUndefineArgs {
        secret: Secret,
    }
    SecretLookupByUsageArgs {
        usage_type: i32,
        usage_id: String,
    }
    SecretLookupByUsageRet {
        secret: Secret,
    }
    InterfaceIsActiveArgs {
        iface: Interface,
    }
    InterfaceIsActiveRet {
        active: i32,
    }
    NwfilterBindingLookupByPortDevArgs {
        name: String,
    }
    NwfilterBindingLookupByPortDevRet {
        nwfilter: NwFilterBinding,
    }
    NwfilterBindingCreateXmlArgs {
        xml: String,
        flags: u32,
    }
    NwfilterBindingCreateXmlRet {
        nwfilter: NwFilterBinding,
    }
    NwfilterBindingDeleteArgs {
        nwfilter: NwFilterBinding,
    }
    NwfilterBindingGetXmlDescArgs {
        nwfilter: NwFilterBinding,
        flags: u32,
    }
    NwfilterBindingGetXmlDescRet {
        xml: String,
    }
}
