//! Values of expressions.

use super::parse::{Axis, Expr, Operator, Start, Step, Test};
use super::tree::{Kind, NodeId, ROOT, Tree};

/// The value of an expression.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nodes in the order of the document, each once.
    Nodes(Vec<NodeId>),
    /// True or false.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// Where an expression is evaluated.
#[derive(Clone, Copy)]
struct Context<'a> {
    tree: &'a Tree,
    node: NodeId,
    /// Its place among the nodes that are looked at, from 1.
    position: usize,
    /// How many nodes are looked at.
    size: usize,
}

/// Evaluates an expression at the document.
///
/// # Errors
///
/// It has an unknown function, or one with wrong arguments.
pub fn evaluate(tree: &Tree, expr: &Expr) -> Result<Value, String> {
    Context {
        tree,
        node: ROOT,
        position: 1,
        size: 1,
    }
    .value(expr)
}

impl Context<'_> {
    fn value(self, expr: &Expr) -> Result<Value, String> {
        Ok(match expr {
            Expr::Literal(text) => Value::Text(text.clone()),
            Expr::Number(number) => Value::Number(*number),
            Expr::Negate(expr) => Value::Number(-self.number(&self.value(expr)?)),
            Expr::Binary(operator, left, right) => self.binary(*operator, left, right)?,
            Expr::Call(name, args) => self.call(name, args)?,
            Expr::Path(start, steps) => {
                let mut nodes = match &**start {
                    Start::Root => vec![ROOT],
                    Start::Context => vec![self.node],
                    Start::Expr(expr, predicates) => {
                        let mut nodes = self.nodes(expr)?;
                        for predicate in predicates {
                            nodes = self.filter(nodes, predicate)?;
                        }
                        nodes
                    }
                };
                for step in steps {
                    nodes = self.step(&nodes, step)?;
                }
                Value::Nodes(nodes)
            }
        })
    }

    fn nodes(self, expr: &Expr) -> Result<Vec<NodeId>, String> {
        match self.value(expr)? {
            Value::Nodes(nodes) => Ok(nodes),
            _ => Err("Invalid type".into()),
        }
    }

    fn step(self, from: &[NodeId], step: &Step) -> Result<Vec<NodeId>, String> {
        let mut all = Vec::new();
        for &node in from {
            let mut nodes = self.axis(node, step.axis);
            nodes.retain(|node| self.passes(*node, step));
            for predicate in &step.predicates {
                nodes = self.filter(nodes, predicate)?;
            }
            all.append(&mut nodes);
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// The nodes in a direction, the nearest first.
    fn axis(self, node: NodeId, axis: Axis) -> Vec<NodeId> {
        let tree = self.tree;
        let descendants = |mut nodes: Vec<NodeId>| {
            tree.descendants(node, &mut nodes);
            nodes
        };
        let ancestors =
            |from: Option<NodeId>| std::iter::successors(from, |node| tree.parent(*node)).collect();
        let siblings = || match (tree.kind(node), tree.parent(node)) {
            (Kind::Attribute { .. }, _) | (_, None) => &[][..],
            (_, Some(parent)) => tree.children(parent),
        };
        match axis {
            Axis::Child => tree.children(node).to_vec(),
            Axis::Descendant => descendants(Vec::new()),
            Axis::DescendantOrSelf => descendants(vec![node]),
            Axis::SelfNode => vec![node],
            Axis::Parent => tree.parent(node).into_iter().collect(),
            Axis::Ancestor => ancestors(tree.parent(node)),
            Axis::AncestorOrSelf => ancestors(Some(node)),
            Axis::Attribute => tree.attributes(node).to_vec(),
            Axis::FollowingSibling => siblings()
                .iter()
                .copied()
                .filter(|other| *other > node)
                .collect(),
            Axis::PrecedingSibling => siblings()
                .iter()
                .rev()
                .copied()
                .filter(|other| *other < node)
                .collect(),
        }
    }

    fn passes(self, node: NodeId, step: &Step) -> bool {
        let kind = self.tree.kind(node);
        let named = match step.axis {
            Axis::Attribute => matches!(kind, Kind::Attribute { .. }),
            _ => matches!(kind, Kind::Element { .. }),
        };
        match &step.test {
            Test::Any => named,
            Test::Name(name) => named && self.tree.name(node) == name,
            Test::Prefix(prefix) => {
                named
                    && self
                        .tree
                        .name(node)
                        .split_once(':')
                        .is_some_and(|(found, _)| found == prefix)
            }
            Test::Node => true,
            Test::Text => matches!(kind, Kind::Text(_)),
            Test::Comment => matches!(kind, Kind::Comment(_)),
        }
    }

    fn filter(self, nodes: Vec<NodeId>, predicate: &Expr) -> Result<Vec<NodeId>, String> {
        let size = nodes.len();
        let mut kept = Vec::new();
        for (index, node) in nodes.into_iter().enumerate() {
            let context = Context {
                node,
                position: index + 1,
                size,
                ..self
            };
            let keep = match context.value(predicate)? {
                // A number is a place. Both are small whole numbers where they can be equal.
                Value::Number(number) => number == context.position as f64,
                value => truth(&value),
            };
            if keep {
                kept.push(node);
            }
        }
        Ok(kept)
    }

    fn binary(self, operator: Operator, left: &Expr, right: &Expr) -> Result<Value, String> {
        Ok(match operator {
            Operator::Or => Value::Bool(truth(&self.value(left)?) || truth(&self.value(right)?)),
            Operator::And => Value::Bool(truth(&self.value(left)?) && truth(&self.value(right)?)),
            Operator::Union => {
                let mut nodes = self.nodes(left)?;
                nodes.append(&mut self.nodes(right)?);
                nodes.sort_unstable();
                nodes.dedup();
                Value::Nodes(nodes)
            }
            Operator::Equal
            | Operator::NotEqual
            | Operator::Less
            | Operator::LessOrEqual
            | Operator::Greater
            | Operator::GreaterOrEqual => {
                Value::Bool(self.compare(operator, &self.value(left)?, &self.value(right)?))
            }
            Operator::Add
            | Operator::Subtract
            | Operator::Multiply
            | Operator::Divide
            | Operator::Modulo => {
                let (left, right) = (
                    self.number(&self.value(left)?),
                    self.number(&self.value(right)?),
                );
                Value::Number(match operator {
                    Operator::Add => left + right,
                    Operator::Subtract => left - right,
                    Operator::Multiply => left * right,
                    Operator::Divide => left / right,
                    _ => left % right,
                })
            }
        })
    }

    /// Section 3.4: a set of nodes compares as any of its nodes does.
    fn compare(self, operator: Operator, left: &Value, right: &Value) -> bool {
        match (left, right) {
            (Value::Nodes(_), Value::Bool(_)) => {
                self.compare(operator, &Value::Bool(truth(left)), right)
            }
            (Value::Bool(_), Value::Nodes(_)) => {
                self.compare(operator, left, &Value::Bool(truth(right)))
            }
            (Value::Nodes(nodes), _) => nodes
                .iter()
                .any(|node| self.compare(operator, &Value::Text(self.tree.text(*node)), right)),
            (_, Value::Nodes(nodes)) => nodes
                .iter()
                .any(|node| self.compare(operator, left, &Value::Text(self.tree.text(*node)))),
            _ => match operator {
                Operator::Equal => self.equal(left, right),
                Operator::NotEqual => !self.equal(left, right),
                _ => {
                    let (left, right) = (self.number(left), self.number(right));
                    match operator {
                        Operator::Less => left < right,
                        Operator::LessOrEqual => left <= right,
                        Operator::Greater => left > right,
                        _ => left >= right,
                    }
                }
            },
        }
    }

    fn equal(self, left: &Value, right: &Value) -> bool {
        match (left, right) {
            (Value::Bool(_), _) | (_, Value::Bool(_)) => truth(left) == truth(right),
            (Value::Number(_), _) | (_, Value::Number(_)) => {
                self.number(left) == self.number(right)
            }
            _ => self.text(left) == self.text(right),
        }
    }

    fn number(self, value: &Value) -> f64 {
        match value {
            Value::Number(number) => *number,
            Value::Bool(truth) => f64::from(u8::from(*truth)),
            // No exponent, no sign but minus, no infinity: what Rust reads beyond that is no number here.
            Value::Nodes(_) | Value::Text(_) => {
                let text = self.text(value);
                let text = text.trim();
                let digits = text.strip_prefix('-').unwrap_or(text);
                let is_number = digits.chars().all(|c| c.is_ascii_digit() || c == '.');
                if is_number {
                    text.parse().unwrap_or(f64::NAN)
                } else {
                    f64::NAN
                }
            }
        }
    }

    fn text(self, value: &Value) -> String {
        match value {
            Value::Text(text) => text.clone(),
            Value::Bool(truth) => truth.to_string(),
            Value::Number(number) => number.to_string(),
            Value::Nodes(nodes) => nodes
                .first()
                .map(|node| self.tree.text(*node))
                .unwrap_or_default(),
        }
    }

    /// The functions of section 4.
    fn call(self, name: &str, args: &[Expr]) -> Result<Value, String> {
        let values = args
            .iter()
            .map(|arg| self.value(arg))
            .collect::<Result<Vec<_>, _>>()?;
        let own = Value::Nodes(vec![self.node]);
        let text = |index: usize| self.text(&values[index]);
        let nodes = |index: usize| match &values[index] {
            Value::Nodes(nodes) => Ok(nodes),
            _ => Err("Invalid type".to_owned()),
        };
        // Most functions of one argument take the context node without it.
        let argument = values.first().unwrap_or(&own);
        Ok(match (name, values.len()) {
            ("last", 0) => Value::Number(self.size as f64),
            ("position", 0) => Value::Number(self.position as f64),
            ("count", 1) => Value::Number(nodes(0)?.len() as f64),
            ("sum", 1) => Value::Number(
                nodes(0)?
                    .iter()
                    .map(|node| self.number(&Value::Text(self.tree.text(*node))))
                    .sum(),
            ),
            ("name" | "local-name", 0 | 1) => {
                let Value::Nodes(nodes) = argument else {
                    return Err("Invalid type".into());
                };
                let full = nodes.first().map_or("", |node| self.tree.name(*node));
                let local = full.rsplit(':').next().unwrap_or(full);
                Value::Text(if name == "name" { full } else { local }.to_owned())
            }
            ("string", 0 | 1) => Value::Text(self.text(argument)),
            ("number", 0 | 1) => Value::Number(self.number(argument)),
            ("string-length", 0 | 1) => Value::Number(self.text(argument).chars().count() as f64),
            ("normalize-space", 0 | 1) => {
                let text = self.text(argument);
                Value::Text(text.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
            }
            ("boolean", 1) => Value::Bool(truth(&values[0])),
            ("not", 1) => Value::Bool(!truth(&values[0])),
            ("true", 0) => Value::Bool(true),
            ("false", 0) => Value::Bool(false),
            ("concat", 2..) => Value::Text((0..values.len()).map(text).collect()),
            ("starts-with", 2) => Value::Bool(text(0).starts_with(&text(1))),
            ("contains", 2) => Value::Bool(text(0).contains(&text(1))),
            ("substring-before", 2) => Value::Text(
                text(0)
                    .split_once(&text(1))
                    .map(|(before, _)| before.to_owned())
                    .unwrap_or_default(),
            ),
            ("substring-after", 2) => Value::Text(
                text(0)
                    .split_once(&text(1))
                    .map(|(_, after)| after.to_owned())
                    .unwrap_or_default(),
            ),
            ("floor", 1) => Value::Number(self.number(&values[0]).floor()),
            ("ceiling", 1) => Value::Number(self.number(&values[0]).ceil()),
            // Halves go up, also below zero.
            ("round", 1) => Value::Number((self.number(&values[0]) + 0.5).floor()),
            _ => {
                return Err(format!(
                    "Unregistered function {name} with {} arguments",
                    values.len()
                ));
            }
        })
    }
}

fn truth(value: &Value) -> bool {
    match value {
        Value::Bool(truth) => *truth,
        Value::Number(number) => *number != 0.0 && !number.is_nan(),
        Value::Text(text) => !text.is_empty(),
        Value::Nodes(nodes) => !nodes.is_empty(),
    }
}
