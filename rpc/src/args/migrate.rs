//! Migration: the arguments and answers of their procedures.

use crate::limits::MIGRATE_COOKIE_MAX;
use crate::types::{Domain, TypedParam};
use crate::xdr::{List, Opaque, xdr_structs};

xdr_structs! {
    DomainMigratePrepareArgs {
        uri_in: Option<String>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
    }
    DomainMigratePrepareRet {
        cookie: Opaque<MIGRATE_COOKIE_MAX>,
        uri_out: Option<String>,
    }
    DomainMigratePerformArgs {
        dom: Domain,
        cookie: Opaque<MIGRATE_COOKIE_MAX>,
        uri: String,
        flags: u64,
        dname: Option<String>,
        resource: u64,
    }
    DomainMigrateFinishArgs {
        dname: String,
        cookie: Opaque<MIGRATE_COOKIE_MAX>,
        uri: String,
        flags: u64,
    }
    DomainMigrateFinishRet {
        ddom: Domain,
    }
    DomainMigratePrepare2Args {
        uri_in: Option<String>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
        dom_xml: String,
    }
    DomainMigratePrepare2Ret {
        cookie: Opaque<MIGRATE_COOKIE_MAX>,
        uri_out: Option<String>,
    }
    DomainMigrateFinish2Args {
        dname: String,
        cookie: Opaque<MIGRATE_COOKIE_MAX>,
        uri: String,
        flags: u64,
        retcode: i32,
    }
    DomainMigrateFinish2Ret {
        ddom: Domain,
    }
    DomainMigratePrepareTunnelArgs {
        flags: u64,
        dname: Option<String>,
        resource: u64,
        dom_xml: String,
    }
    DomainMigrateGetMaxDowntimeArgs {
        dom: Domain,
        flags: u32,
    }
    DomainMigrateGetMaxDowntimeRet {
        downtime: u64,
    }
    DomainMigrateSetMaxDowntimeArgs {
        dom: Domain,
        downtime: u64,
        flags: u32,
    }
    DomainMigrateGetCompressionCacheArgs {
        dom: Domain,
        flags: u32,
    }
    DomainMigrateGetCompressionCacheRet {
        cache_size: u64,
    }
    DomainMigrateSetCompressionCacheArgs {
        dom: Domain,
        cache_size: u64,
        flags: u32,
    }
    DomainMigrateSetMaxSpeedArgs {
        dom: Domain,
        bandwidth: u64,
        flags: u32,
    }
    DomainMigrateGetMaxSpeedArgs {
        dom: Domain,
        flags: u32,
    }
    DomainMigrateGetMaxSpeedRet {
        bandwidth: u64,
    }
    DomainMigrateBegin3Args {
        dom: Domain,
        xmlin: Option<String>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
    }
    DomainMigrateBegin3Ret {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
        xml: String,
    }
    DomainMigratePrepare3Args {
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        uri_in: Option<String>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
        dom_xml: String,
    }
    DomainMigratePrepare3Ret {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
        uri_out: Option<String>,
    }
    DomainMigratePrepareTunnel3Args {
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
        dom_xml: String,
    }
    DomainMigratePrepareTunnel3Ret {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigratePerform3Args {
        dom: Domain,
        xmlin: Option<String>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        dconnuri: Option<String>,
        uri: Option<String>,
        flags: u64,
        dname: Option<String>,
        resource: u64,
    }
    DomainMigratePerform3Ret {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigrateFinish3Args {
        dname: String,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        dconnuri: Option<String>,
        uri: Option<String>,
        flags: u64,
        cancelled: i32,
    }
    DomainMigrateFinish3Ret {
        dom: Domain,
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigrateConfirm3Args {
        dom: Domain,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u64,
        cancelled: i32,
    }
    DomainMigrateBegin3ParamsArgs {
        dom: Domain,
        params: List<TypedParam, 64>,
        flags: u32,
    }
    DomainMigrateBegin3ParamsRet {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
        xml: String,
    }
    DomainMigratePrepare3ParamsArgs {
        params: List<TypedParam, 64>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u32,
    }
    DomainMigratePrepare3ParamsRet {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
        uri_out: Option<String>,
    }
    DomainMigratePrepareTunnel3ParamsArgs {
        params: List<TypedParam, 64>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u32,
    }
    DomainMigratePrepareTunnel3ParamsRet {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigratePerform3ParamsArgs {
        dom: Domain,
        dconnuri: Option<String>,
        params: List<TypedParam, 64>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u32,
    }
    DomainMigratePerform3ParamsRet {
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigrateFinish3ParamsArgs {
        params: List<TypedParam, 64>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u32,
        cancelled: i32,
    }
    DomainMigrateFinish3ParamsRet {
        dom: Domain,
        cookie_out: Opaque<MIGRATE_COOKIE_MAX>,
    }
    DomainMigrateConfirm3ParamsArgs {
        dom: Domain,
        params: List<TypedParam, 64>,
        cookie_in: Opaque<MIGRATE_COOKIE_MAX>,
        flags: u32,
        cancelled: i32,
    }
    DomainMigrateStartPostCopyArgs {
        dom: Domain,
        flags: u32,
    }
}
