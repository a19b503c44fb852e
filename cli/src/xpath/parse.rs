//! Expressions from text.

/// An expression.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// Two expressions and what is between them.
    Binary(Operator, Box<Expr>, Box<Expr>),
    /// A number's negative.
    Negate(Box<Expr>),
    /// A text.
    Literal(String),
    /// A number.
    Number(f64),
    /// A function and its arguments.
    Call(String, Vec<Expr>),
    /// Steps from somewhere.
    Path(Box<Start>, Vec<Step>),
}

/// Where a path begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// The document.
    Root,
    /// The context node.
    Context,
    /// The nodes that an expression selects, of which predicates leave some.
    Expr(Expr, Vec<Expr>),
}

/// What is between two expressions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Union,
}

/// A step from each node to others.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// In which direction.
    pub axis: Axis,
    /// To which nodes.
    pub test: Test,
    /// Which of them stay.
    pub predicates: Vec<Expr>,
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    Child,
    Descendant,
    DescendantOrSelf,
    SelfNode,
    Parent,
    Ancestor,
    AncestorOrSelf,
    Attribute,
    FollowingSibling,
    PrecedingSibling,
}

/// Which nodes a step takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Test {
    /// Elements (or attributes) of any name.
    Any,
    /// Those of this name.
    Name(String),
    /// Those with this prefix.
    Prefix(String),
    /// All nodes.
    Node,
    /// Texts.
    Text,
    /// Comments.
    Comment,
}

/// How deep expressions may be nested. Each level takes a dozen calls to read.
const DEPTH_MAX: usize = 32;
/// How many operators an expression may have: as many calls, in the worst case, to evaluate it.
const OPERATORS_MAX: usize = 200;

/// Reads an expression.
///
/// # Errors
///
/// It is none; why, in a few words, and at which byte.
pub fn parse(text: &str) -> Result<Expr, (String, usize)> {
    let mut parser = Parser {
        rest: text,
        depth: 0,
        operators: 0,
    };
    let read = parser.binary(0);
    parser.blanks();
    let at = text.len() - parser.rest.len();
    match read {
        Ok(expr) if parser.rest.is_empty() => Ok(expr),
        Ok(_) => Err((invalid(), at)),
        Err(why) => Err((why, at)),
    }
}

fn invalid() -> String {
    "Invalid expression".into()
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
    operators: usize,
}

/// Operators by how strongly they bind, the weakest first; longer ones before those they begin with.
const LEVELS: &[&[(&str, Operator)]] = &[
    &[("or", Operator::Or)],
    &[("and", Operator::And)],
    &[("=", Operator::Equal), ("!=", Operator::NotEqual)],
    &[
        ("<=", Operator::LessOrEqual),
        (">=", Operator::GreaterOrEqual),
        ("<", Operator::Less),
        (">", Operator::Greater),
    ],
    &[("+", Operator::Add), ("-", Operator::Subtract)],
    &[
        ("*", Operator::Multiply),
        ("div", Operator::Divide),
        ("mod", Operator::Modulo),
    ],
];

impl<'a> Parser<'a> {
    fn blanks(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        self.blanks();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// An operator; one that is a word must end there.
    fn operator(&mut self, token: &str) -> bool {
        self.blanks();
        let Some(rest) = self.rest.strip_prefix(token) else {
            return false;
        };
        let is_word = token.starts_with(|c: char| c.is_ascii_alphabetic());
        if is_word && rest.starts_with(is_name) {
            return false;
        }
        self.rest = rest;
        true
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) {
            Ok(())
        } else {
            Err(invalid())
        }
    }

    fn deeper<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        if self.depth >= DEPTH_MAX {
            return Err("Expression is nested too deep".into());
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }

    fn binary(&mut self, level: usize) -> Result<Expr, String> {
        let Some(operators) = LEVELS.get(level) else {
            return self.unary();
        };
        let mut left = self.binary(level + 1)?;
        'operators: loop {
            for (token, operator) in *operators {
                if self.operator(token) {
                    left = self.join(*operator, left, |parser| parser.binary(level + 1))?;
                    continue 'operators;
                }
            }
            return Ok(left);
        }
    }

    /// The tree of operators leans to the left, as deep as there are operators: they are counted as well.
    fn join(
        &mut self,
        operator: Operator,
        left: Expr,
        right: impl FnOnce(&mut Self) -> Result<Expr, String>,
    ) -> Result<Expr, String> {
        self.operators += 1;
        if self.operators > OPERATORS_MAX {
            return Err("Expression has too many operators".into());
        }
        Ok(Expr::Binary(
            operator,
            Box::new(left),
            Box::new(right(self)?),
        ))
    }

    fn unary(&mut self) -> Result<Expr, String> {
        if self.take("-") {
            return Ok(Expr::Negate(Box::new(self.deeper(Self::unary)?)));
        }
        let mut left = self.path()?;
        while self.take("|") {
            left = self.join(Operator::Union, left, Self::path)?;
        }
        Ok(left)
    }

    fn path(&mut self) -> Result<Expr, String> {
        self.blanks();
        if let Some(primary) = self.primary()? {
            let predicates = self.predicates()?;
            let steps = self.more_steps(Vec::new())?;
            if predicates.is_empty() && steps.is_empty() {
                return Ok(primary);
            }
            return Ok(Expr::Path(
                Box::new(Start::Expr(primary, predicates)),
                steps,
            ));
        }
        if self.take("//") {
            let first = self.step()?;
            let steps = self.more_steps(vec![anywhere(), first])?;
            return Ok(Expr::Path(Box::new(Start::Root), steps));
        }
        if self.take("/") {
            let steps = if self.at_step() {
                let first = self.step()?;
                self.more_steps(vec![first])?
            } else {
                Vec::new()
            };
            return Ok(Expr::Path(Box::new(Start::Root), steps));
        }
        let first = self.step()?;
        let steps = self.more_steps(vec![first])?;
        Ok(Expr::Path(Box::new(Start::Context), steps))
    }

    /// A text, a number, an expression in parentheses or a function; nothing if a path begins here.
    fn primary(&mut self) -> Result<Option<Expr>, String> {
        if self.take("(") {
            let expr = self.deeper(|parser| parser.binary(0))?;
            self.expect(")")?;
            return Ok(Some(expr));
        }
        if let Some(quote) = self.rest.chars().next().filter(|c| matches!(c, '\'' | '"')) {
            let (text, rest) = self.rest[1..]
                .split_once(quote)
                .ok_or("Unfinished literal")?;
            self.rest = rest;
            return Ok(Some(Expr::Literal(text.to_owned())));
        }
        let digits = self.rest.trim_start_matches('.');
        if digits.len() + 1 >= self.rest.len() && digits.starts_with(|c: char| c.is_ascii_digit()) {
            let end = self
                .rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .unwrap_or(self.rest.len());
            let (number, rest) = self.rest.split_at(end);
            self.rest = rest;
            return number
                .parse()
                .map(|number| Some(Expr::Number(number)))
                .map_err(|_| invalid());
        }
        let name = self.peek_name();
        let after = self.rest[name.len()..].trim_start();
        if name.is_empty() || !after.starts_with('(') || matches!(name, "node" | "text" | "comment")
        {
            return Ok(None);
        }
        let name = name.to_owned();
        self.rest = &after[1..];
        let mut args = Vec::new();
        if !self.take(")") {
            loop {
                args.push(self.deeper(|parser| parser.binary(0))?);
                if self.take(")") {
                    break;
                }
                self.expect(",")?;
            }
        }
        Ok(Some(Expr::Call(name, args)))
    }

    fn predicates(&mut self) -> Result<Vec<Expr>, String> {
        let mut predicates = Vec::new();
        while self.take("[") {
            predicates.push(self.deeper(|parser| parser.binary(0))?);
            self.expect("]")?;
        }
        Ok(predicates)
    }

    fn more_steps(&mut self, mut steps: Vec<Step>) -> Result<Vec<Step>, String> {
        loop {
            if self.take("//") {
                steps.push(anywhere());
            } else if !self.take("/") {
                return Ok(steps);
            }
            steps.push(self.step()?);
        }
    }

    fn at_step(&mut self) -> bool {
        self.blanks();
        self.rest
            .starts_with(|c: char| matches!(c, '.' | '@' | '*') || is_name_start(c))
    }

    fn step(&mut self) -> Result<Step, String> {
        self.blanks();
        let abbreviated = |axis| Step {
            axis,
            test: Test::Node,
            predicates: Vec::new(),
        };
        if self.take("..") {
            return Ok(abbreviated(Axis::Parent));
        }
        if self.take(".") {
            return Ok(abbreviated(Axis::SelfNode));
        }
        let mut axis = Axis::Child;
        if self.take("@") {
            axis = Axis::Attribute;
        } else {
            let name = self.peek_name();
            if let Some(rest) = self.rest[name.len()..].trim_start().strip_prefix("::") {
                axis = match name {
                    "child" => Axis::Child,
                    "descendant" => Axis::Descendant,
                    "descendant-or-self" => Axis::DescendantOrSelf,
                    "self" => Axis::SelfNode,
                    "parent" => Axis::Parent,
                    "ancestor" => Axis::Ancestor,
                    "ancestor-or-self" => Axis::AncestorOrSelf,
                    "attribute" => Axis::Attribute,
                    "following-sibling" => Axis::FollowingSibling,
                    "preceding-sibling" => Axis::PrecedingSibling,
                    _ => return Err(format!("Unknown axis '{name}'")),
                };
                self.rest = rest;
            }
        }
        let test = self.test()?;
        Ok(Step {
            axis,
            test,
            predicates: self.predicates()?,
        })
    }

    fn test(&mut self) -> Result<Test, String> {
        if self.take("*") {
            return Ok(Test::Any);
        }
        let name = self.peek_name().to_owned();
        if name.is_empty() {
            return Err(invalid());
        }
        self.rest = &self.rest[name.len()..];
        if let Some(rest) = self.rest.strip_prefix(':') {
            self.rest = rest;
            if self.take("*") {
                return Ok(Test::Prefix(name));
            }
            let local = self.peek_name().to_owned();
            if local.is_empty() {
                return Err(invalid());
            }
            self.rest = &self.rest[local.len()..];
            return Ok(Test::Name(format!("{name}:{local}")));
        }
        let kind = match name.as_str() {
            "node" => Test::Node,
            "text" => Test::Text,
            "comment" => Test::Comment,
            _ => return Ok(Test::Name(name)),
        };
        if self.take("(") {
            self.expect(")")?;
            return Ok(kind);
        }
        Ok(Test::Name(name))
    }

    /// The name that the rest begins with, without a prefix.
    fn peek_name(&mut self) -> &'a str {
        self.blanks();
        if !self.rest.starts_with(is_name_start) {
            return "";
        }
        let end = self.rest.find(|c| !is_name(c)).unwrap_or(self.rest.len());
        &self.rest[..end]
    }
}

/// What `//` stands for.
fn anywhere() -> Step {
    Step {
        axis: Axis::DescendantOrSelf,
        test: Test::Node,
        predicates: Vec::new(),
    }
}

fn is_name_start(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}
