//! XPath 1.0 over libvirt's documents, for `dumpxml --xpath`.
//!
//! All of the language (<https://www.w3.org/TR/1999/REC-xpath-19991116/>) but variables, the axes `following`,
//! `preceding` and `namespace`, processing instructions, and the functions `id`, `lang`, `substring` and
//! `translate`: an expression with one of those is refused.

mod evaluate;
mod parse;
mod tree;

use tree::{Kind, NodeId, Tree};

/// The nodes that an expression selected, in the order of the document.
#[derive(Debug)]
pub struct Selected {
    tree: Tree,
    nodes: Vec<NodeId>,
}

/// Selects nodes of a document.
///
/// # Errors
///
/// The document is no XML; the expression is none, or has a value that is not a set of nodes.
pub fn select(xml: &str, expression: &str) -> Result<Selected, String> {
    let root = xml_schemas::dom::parse(xml, "(definition_of_domain)")
        .map_err(|error| error.to_string())?;
    // As libxml2 says it: three lines, the last of which points at the place.
    let parsed = parse::parse(expression).map_err(|(why, at)| {
        let column = expression
            .get(..at)
            .map_or(0, |before| before.chars().count());
        format!("XPath error : {why}\n{expression}\n{:column$}^", "")
    })?;
    let tree = Tree::new(&root);
    match evaluate::evaluate(&tree, &parsed) {
        Ok(evaluate::Value::Nodes(nodes)) => Ok(Selected { tree, nodes }),
        Ok(_) => Err(format!("internal error: Incorrect xpath '{expression}'")),
        Err(why) => Err(format!("XPath error : {why}: {expression}")),
    }
}

impl Selected {
    /// Each node by itself.
    pub fn plain(&self) -> String {
        let mut text = String::new();
        for &node in &self.nodes {
            self.write(node, 0, &mut text);
            text.push('\n');
        }
        text
    }

    /// All nodes in one root element `nodes`.
    pub fn wrapped(&self) -> String {
        let mut text = String::from("<nodes");
        let (attributes, contents): (Vec<NodeId>, Vec<NodeId>) = self
            .nodes
            .iter()
            .partition(|node| matches!(self.tree.kind(**node), Kind::Attribute { .. }));
        for node in attributes {
            self.write(node, 0, &mut text);
        }
        self.write_contents("nodes", &contents, 0, &mut text);
        text.push('\n');
        text
    }

    fn write(&self, node: NodeId, level: usize, text: &mut String) {
        match self.tree.kind(node) {
            Kind::Root => {
                text.push_str("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
                for &child in self.tree.children(node) {
                    self.write(child, level, text);
                }
            }
            Kind::Element { name } => {
                text.push('<');
                text.push_str(name);
                for &attribute in self.tree.attributes(node) {
                    self.write(attribute, level, text);
                }
                self.write_contents(name, self.tree.children(node), level, text);
            }
            Kind::Attribute { name, value } => {
                text.push_str(&format!(" {name}=\""));
                escape(value, true, text);
                text.push('"');
            }
            Kind::Text(content) => escape(content, false, text),
            Kind::Comment(content) => text.push_str(&format!("<!--{content}-->")),
        }
    }

    /// What comes after a start tag's attributes. Elements get lines of their own, unless there is text
    /// between them, where a blank would matter.
    fn write_contents(&self, name: &str, contents: &[NodeId], level: usize, text: &mut String) {
        if contents.is_empty() {
            text.push_str("/>");
            return;
        }
        text.push('>');
        let inline = contents
            .iter()
            .any(|node| matches!(self.tree.kind(*node), Kind::Text(_)));
        for &node in contents {
            if !inline {
                text.push('\n');
                text.push_str(&"  ".repeat(level + 1));
            }
            self.write(node, level + 1, text);
        }
        if !inline {
            text.push('\n');
            text.push_str(&"  ".repeat(level));
        }
        text.push_str(&format!("</{name}>"));
    }
}

fn escape(value: &str, attribute: bool, text: &mut String) {
    for c in value.chars() {
        match c {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '"' if attribute => text.push_str("&quot;"),
            '\n' if attribute => text.push_str("&#10;"),
            '\t' if attribute => text.push_str("&#9;"),
            '\r' => text.push_str("&#13;"),
            _ => text.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='test' id='1'>
  <name>test &amp; more</name>
  <vcpu>2</vcpu>
  <os>
    <type arch='i686'>hvm</type>
    <boot dev='hd'/>
  </os>
  <devices>
    <disk type='file'><target dev='vda'/></disk>
    <disk type='block'><target dev='vdb'/></disk>
    <serial type='pty'><target port='0'/></serial>
  </devices>
</domain>";

    fn plain(expression: &str) -> String {
        select(XML, expression).unwrap().plain()
    }

    fn count(expression: &str) -> usize {
        select(XML, expression).unwrap().nodes.len()
    }

    #[test]
    fn nodes_are_printed_as_virsh_prints_them() {
        assert_eq!(plain("//vcpu"), "<vcpu>2</vcpu>\n");
        assert_eq!(
            plain("/domain/os"),
            "<os>\n  <type arch=\"i686\">hvm</type>\n  <boot dev=\"hd\"/>\n</os>\n"
        );
        assert_eq!(plain("//@id"), " id=\"1\"\n");
        assert_eq!(plain("//name/text()"), "test &amp; more\n");
        assert_eq!(plain("//nosuch"), "");
        assert!(
            plain("/")
                .starts_with("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<domain type=\"test\"")
        );
    }

    #[test]
    fn a_root_element_can_be_put_around_them() {
        let wrapped = |expression| select(XML, expression).unwrap().wrapped();
        assert_eq!(wrapped("//vcpu"), "<nodes>\n  <vcpu>2</vcpu>\n</nodes>\n");
        assert_eq!(wrapped("//nosuch"), "<nodes/>\n");
        assert_eq!(wrapped("//vcpu/text()"), "<nodes>2</nodes>\n");
        assert_eq!(wrapped("//@id"), "<nodes id=\"1\"/>\n");
    }

    #[test]
    fn paths_predicates_and_functions() {
        assert_eq!(count("//disk"), 2);
        assert_eq!(count("//*"), 13);
        assert_eq!(count("/domain/devices/*[target]"), 3);
        assert_eq!(plain("//disk[2]/target/@dev"), " dev=\"vdb\"\n");
        assert_eq!(plain("//disk[@type='file']/target/@dev"), " dev=\"vda\"\n");
        assert_eq!(
            plain("//disk[target/@dev = \"vdb\"]/@type"),
            " type=\"block\"\n"
        );
        assert_eq!(plain("(//disk)[last()]/@type"), " type=\"block\"\n");
        assert_eq!(plain("//target[@port]/../@type"), " type=\"pty\"\n");
        assert_eq!(
            plain("//boot/parent::os/child::type/@arch"),
            " arch=\"i686\"\n"
        );
        assert_eq!(count("//vcpu | //name | //vcpu"), 2);
        assert_eq!(count("//disk[position() < 2]"), 1);
        assert_eq!(
            count("//disk[not(@type='file') and contains(@type, 'lo')]"),
            1
        );
        assert_eq!(count("//*[starts-with(name(), 'd')]"), 4);
        assert_eq!(count("//vcpu[. = 2]"), 1);
        assert_eq!(count("//vcpu[. + 1 > 3 or . * 2 = 4]"), 1);
        assert_eq!(count("/domain[count(.//disk) = 2]"), 1);
        assert_eq!(count("//target/ancestor::devices"), 1);
        assert_eq!(count("//disk/following-sibling::*"), 2);
        assert_eq!(count("//name[string-length(normalize-space(.)) = 11]"), 1);
        assert_eq!(count("/domain/descendant-or-self::node()/@dev"), 3);
    }

    #[test]
    fn what_is_no_set_of_nodes_is_refused() {
        for expression in ["string(//name)", "count(//vcpu)", "1", "'x'", "1 = 1"] {
            assert_eq!(
                select(XML, expression).unwrap_err(),
                format!("internal error: Incorrect xpath '{expression}'")
            );
        }
    }

    #[test]
    fn what_is_no_expression_is_refused() {
        for expression in [
            "", "///", "//", "//disk[", "//disk]", "@", "//a::b", "nosuch()", "'x", "$x", "1 +",
            "count()",
        ] {
            let error = select(XML, expression).unwrap_err();
            assert!(error.starts_with("XPath error : "), "{expression}: {error}");
        }
        assert!(select(XML, &"(".repeat(100_000)).is_err());
        assert!(select(XML, &format!("1{}", "+1".repeat(100_000))).is_err());
        assert!(select(XML, &format!("{}1", "-".repeat(100_000))).is_err());
    }
}
