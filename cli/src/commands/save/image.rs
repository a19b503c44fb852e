//! The XML inside saved images: `save-image-*`, `managedsave-dumpxml`, `-define`, `-edit`.

use rpc::args::{
    DomainManagedSaveDefineXmlArgs, DomainManagedSaveGetXmlDescArgs, DomainSaveImageDefineXmlArgs,
    DomainSaveImageGetXmlDescArgs,
};
use rpc::procs;
use rpc::types::Domain;

use super::super::definition::print_selected;
use super::super::{ANY, find_domain, read_definition};
use super::{PAUSED, RUNNING, STATE_OPTIONS, absolute, save_flags};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, text};
use crate::editor::{self, Draft};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const FILE: Opt = data("file", "saved state file").values(Values::Files);
const XML: Opt = data("xml", "file with the updated XML").values(Values::Files);
const SECURITY: Opt = flag("security-info", "include security sensitive information");
const XPATH: Opt = text("xpath", "an XPath expression that selects what is shown");
const WRAP: Opt = flag("wrap", "wrap what is selected in a root element");

/// `save-image-dumpxml`
pub const SAVE_IMAGE_DUMPXML: Command = Command {
    name: "save-image-dumpxml",
    summary: "saved state domain information in XML",
    description: "Shows the XML inside a saved state.",
    options: &[FILE, SECURITY, XPATH, WRAP],
    handler: |shell, args| {
        let place = Place::file(args)?;
        dumpxml(shell, args, &place)
    },
    connects: true,
};

/// `save-image-define`
pub const SAVE_IMAGE_DEFINE: Command = Command {
    name: "save-image-define",
    summary: "redefine the XML for a domain's saved state file",
    description: "Replaces the XML inside a saved state.",
    options: &[FILE, XML, RUNNING, PAUSED],
    handler: |shell, args| {
        let place = Place::file(args)?;
        define_file(shell, args, &place)
    },
    connects: true,
};

/// `save-image-edit`
pub const SAVE_IMAGE_EDIT: Command = Command {
    name: "save-image-edit",
    summary: "edit XML for a domain's saved state file",
    description: "Lets you edit the XML inside a saved state.",
    options: &[FILE, RUNNING, PAUSED],
    handler: |shell, args| {
        let place = Place::file(args)?;
        edit(shell, args, &place)
    },
    connects: true,
};

/// `managedsave-dumpxml`
pub const MANAGEDSAVE_DUMPXML: Command = Command {
    name: "managedsave-dumpxml",
    summary: "Domain information of managed save state file in XML",
    description: "Shows the XML inside a domain's managed save.",
    options: &[DOMAIN, SECURITY, XPATH, WRAP],
    handler: |shell, args| {
        let place = Place::managed(shell, args)?;
        dumpxml(shell, args, &place)
    },
    connects: true,
};

/// `managedsave-define`
pub const MANAGEDSAVE_DEFINE: Command = Command {
    name: "managedsave-define",
    summary: "redefine the XML for a domain's managed save state file",
    description: "Replaces the XML inside a domain's managed save.",
    options: &[DOMAIN, XML, RUNNING, PAUSED],
    handler: |shell, args| {
        let place = Place::managed(shell, args)?;
        define_file(shell, args, &place)
    },
    connects: true,
};

/// `managedsave-edit`
pub const MANAGEDSAVE_EDIT: Command = Command {
    name: "managedsave-edit",
    summary: "edit XML for a domain's managed save state file",
    description: "Lets you edit the XML inside a domain's managed save.",
    options: &[DOMAIN, RUNNING, PAUSED],
    handler: |shell, args| {
        let place = Place::managed(shell, args)?;
        edit(shell, args, &place)
    },
    connects: true,
};

/// Where a saved state is.
enum Place {
    /// In a file, by the name the user gave and in full.
    File(String, String),
    /// A domain's managed save.
    Managed(Domain),
}

impl Place {
    fn file(args: &Args) -> Result<Self> {
        let file = args.required("file")?;
        Ok(Self::File(file.to_owned(), absolute(file)?))
    }

    fn managed(shell: &mut Shell, args: &Args) -> Result<Self> {
        find_domain(shell, args, ANY).map(Self::Managed)
    }

    fn xml(&self, shell: &mut Shell, flags: u32) -> Result<String> {
        match self {
            Self::File(_, file) => {
                let file = file.clone();
                let args = DomainSaveImageGetXmlDescArgs { file, flags };
                Ok(shell
                    .call(procs::DOMAIN_SAVE_IMAGE_GET_XML_DESC, &args)?
                    .xml)
            }
            Self::Managed(dom) => {
                let dom = dom.clone();
                let args = DomainManagedSaveGetXmlDescArgs { dom, flags };
                Ok(shell
                    .call(procs::DOMAIN_MANAGED_SAVE_GET_XML_DESC, &args)?
                    .xml)
            }
        }
    }

    fn define(&self, shell: &mut Shell, xml: &str, flags: u32) -> Result {
        match self {
            Self::File(_, file) => {
                let args = DomainSaveImageDefineXmlArgs {
                    file: file.clone(),
                    dxml: xml.to_owned(),
                    flags,
                };
                shell.call(procs::DOMAIN_SAVE_IMAGE_DEFINE_XML, &args)
            }
            Self::Managed(dom) => {
                let args = DomainManagedSaveDefineXmlArgs {
                    dom: dom.clone(),
                    dxml: Some(xml.to_owned()),
                    flags,
                };
                shell.call(procs::DOMAIN_MANAGED_SAVE_DEFINE_XML, &args)
            }
        }
    }
}

fn dumpxml(shell: &mut Shell, args: &Args, place: &Place) -> Result {
    let xml = place.xml(shell, u32::from(args.has("security-info")))?;
    print_selected(shell, args, &xml)
}

fn define_file(shell: &mut Shell, args: &Args, place: &Place) -> Result {
    args.exclusive("running", "paused")?;
    let xml = read_definition(args.required("xml")?)?;
    let what = match place {
        Place::File(file, _) => file.clone(),
        Place::Managed(dom) => format!("{} XML configuration", dom.name),
    };
    place
        .define(shell, &xml, save_flags(args, &STATE_OPTIONS))
        .with_context(|| format!("Failed to update {what}"))?;
    shell.out.print_extra(match place {
        Place::File(file, _) => format!("State file {file} updated.\n"),
        Place::Managed(dom) => {
            format!(
                "Managed save state file of domain '{}' updated.\n",
                dom.name
            )
        }
    });
    Ok(())
}

/// VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
const SECURE: u32 = 1;

fn edit(shell: &mut Shell, args: &Args, place: &Place) -> Result {
    args.exclusive("running", "paused")?;
    let flags = save_flags(args, &STATE_OPTIONS);
    let original = place.xml(shell, SECURE)?;
    let mut draft = Draft::new(&original)?;
    loop {
        draft.edit()?;
        let text = draft.read()?;
        if text == original && flags == 0 {
            shell.out.print_extra(match place {
                Place::File(file, _) => {
                    format!("Saved image {file} XML configuration not changed.\n")
                }
                Place::Managed(dom) => format!(
                    "Managed save image of domain '{}' XML configuration not changed.\n",
                    dom.name
                ),
            });
            return Ok(());
        }
        let stored = if place.xml(shell, SECURE)? == original {
            place.define(shell, &text, flags)
        } else {
            Err(Failure::new(
                "ERROR: the XML configuration was changed by another user",
            ))
        };
        let Err(failure) = stored else {
            shell.out.print_extra(match place {
                Place::File(file, _) => format!("State file {file} edited.\n"),
                Place::Managed(dom) => format!(
                    "Managed save image of Domain '{}' XML configuration edited.\n",
                    dom.name
                ),
            });
            return Ok(());
        };
        match editor::ask_retry(shell, &failure, false)? {
            editor::Answer::Again | editor::Answer::WithoutValidation => {}
            editor::Answer::GiveUp => return Err(Failure::silent()),
        }
    }
}
