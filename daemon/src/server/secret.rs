//! Secrets.

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;
use rpc::types;
use uuid::Uuid;
use xml_schemas::secret::Secret;

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::blocking;

/// The functions for secrets.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_NUM_OF_SECRETS, num_of_secrets)
        .on(procs::CONNECT_LIST_SECRETS, list_secrets)
        .on(procs::CONNECT_LIST_ALL_SECRETS, list_all_secrets)
        .on(procs::SECRET_LOOKUP_BY_UUID, lookup_by_uuid)
        .on(procs::SECRET_LOOKUP_BY_USAGE, lookup_by_usage)
        .on(procs::SECRET_DEFINE_XML, define_xml)
        .on(procs::SECRET_GET_XML_DESC, get_xml_desc)
        .on(procs::SECRET_SET_VALUE, set_value)
        .on(procs::SECRET_GET_VALUE, get_value)
        .on(procs::SECRET_UNDEFINE, undefine)
}

/// A secret on the wire.
fn reference(secret: &Secret) -> types::Secret {
    types::Secret {
        uuid: secret.uuid.into_bytes(),
        usage_type: secret.usage.number(),
        usage_id: secret.usage.id().to_owned(),
    }
}

fn uuid(secret: &types::Secret) -> Uuid {
    Uuid::from_bytes(secret.uuid)
}

async fn num_of_secrets(call: Call, (): ()) -> Answer<ConnectNumOfSecretsRet> {
    let num = count(call.state().secrets().list(0)?.len());
    Ok(ConnectNumOfSecretsRet { num })
}

async fn list_secrets(call: Call, args: ConnectListSecretsArgs) -> Answer<ConnectListSecretsRet> {
    let found = call.state().secrets().list(0)?;
    let most = usize::try_from(args.maxuuids).unwrap_or(0);
    let uuids = found.iter().map(|secret| secret.uuid.to_string());
    Ok(ConnectListSecretsRet {
        uuids: uuids.take(most).collect(),
    })
}

async fn list_all_secrets(
    call: Call,
    args: ConnectListAllSecretsArgs,
) -> Answer<ConnectListAllSecretsRet> {
    let found = call.state().secrets().list(args.flags)?;
    let ret = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let secrets = if args.need_results != 0 {
        found.iter().map(reference).collect()
    } else {
        Vec::new().into()
    };
    Ok(ConnectListAllSecretsRet { secrets, ret })
}

async fn lookup_by_uuid(call: Call, args: SecretLookupByUuidArgs) -> Answer<SecretLookupByUuidRet> {
    let secret = call
        .state()
        .secrets()
        .by_uuid(Uuid::from_bytes(args.uuid))?;
    Ok(SecretLookupByUuidRet {
        secret: reference(&secret),
    })
}

async fn lookup_by_usage(
    call: Call,
    args: SecretLookupByUsageArgs,
) -> Answer<SecretLookupByUsageRet> {
    let secret = call
        .state()
        .secrets()
        .by_usage(args.usage_type, &args.usage_id)?;
    Ok(SecretLookupByUsageRet {
        secret: reference(&secret),
    })
}

async fn define_xml(call: Call, args: SecretDefineXmlArgs) -> Answer<SecretDefineXmlRet> {
    let driver = call.state().secrets();
    let secret = blocking(move || driver.define(&args.xml, args.flags)).await??;
    Ok(SecretDefineXmlRet {
        secret: reference(&secret),
    })
}

async fn get_xml_desc(call: Call, args: SecretGetXmlDescArgs) -> Answer<SecretGetXmlDescRet> {
    crate::error::check_flags(args.flags, 0, "secretGetXMLDesc")?;
    let secret = call.state().secrets().by_uuid(uuid(&args.secret))?;
    Ok(SecretGetXmlDescRet {
        xml: secret.format(),
    })
}

async fn set_value(call: Call, args: SecretSetValueArgs) -> Answer<()> {
    let driver = call.state().secrets();
    let set = move || driver.set_value(uuid(&args.secret), args.value.0, args.flags);
    Ok(blocking(set).await??)
}

async fn get_value(call: Call, args: SecretGetValueArgs) -> Answer<SecretGetValueRet> {
    let value = call
        .state()
        .secrets()
        .value(uuid(&args.secret), args.flags)?;
    Ok(SecretGetValueRet {
        value: value.into(),
    })
}

async fn undefine(call: Call, args: SecretUndefineArgs) -> Answer<()> {
    let driver = call.state().secrets();
    Ok(blocking(move || driver.undefine(uuid(&args.secret))).await??)
}
