//! Tables as virsh prints them: one blank before each cell, two after, a dashed line under the header.

use unicode_width::UnicodeWidthStr;

/// A table under construction. The first row is the header.
#[derive(Debug)]
pub struct Table {
    columns: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this header.
    pub fn new(header: &[&str]) -> Self {
        Self {
            columns: header.len(),
            rows: vec![header.iter().map(|cell| printable(cell)).collect()],
        }
    }

    /// Adds a row, which has as many cells as the header.
    pub fn row<I>(&mut self, cells: I)
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let row: Vec<String> = cells
            .into_iter()
            .map(|cell| printable(cell.as_ref()))
            .collect();
        debug_assert_eq!(row.len(), self.columns);
        self.rows.push(row);
    }

    /// The table as text; without a header (`--quiet`), the header's width doesn't count either.
    pub fn format(&self, header: bool) -> String {
        let rows = if header {
            &self.rows[..]
        } else {
            &self.rows[1..]
        };
        let widths: Vec<usize> = (0..self.columns)
            .map(|column| {
                rows.iter()
                    .map(|row| row[column].width())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for (index, row) in rows.iter().enumerate() {
            for (column, cell) in row.iter().enumerate() {
                text.push(' ');
                text.push_str(cell);
                if column + 1 < self.columns {
                    let padding = widths[column].saturating_sub(cell.width()) + 2;
                    text.extend(std::iter::repeat_n(' ', padding));
                }
            }
            text.push('\n');
            if header && index == 0 {
                let width: usize = widths.iter().map(|width| width + 3).sum();
                text.extend(std::iter::repeat_n('-', width));
                text.push('\n');
            }
        }
        text
    }
}

/// Replaces characters that would disturb the terminal by `\xNN` for each of their bytes.
fn printable(cell: &str) -> String {
    let mut text = String::with_capacity(cell.len());
    for character in cell.chars() {
        if character.is_control() {
            let mut bytes = [0; 4];
            for byte in character.encode_utf8(&mut bytes).bytes() {
                text.push_str(&format!("\\x{byte:02x}"));
            }
        } else {
            text.push(character);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_table_is_a_header_and_a_line() {
        let table = Table::new(&["Id", "Name", "State"]);
        assert_eq!(
            table.format(true),
            " Id   Name   State\n--------------------\n"
        );
        assert_eq!(table.format(false), "");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["Id", "Name", "State"]);
        table.row(["1", "test", "running"]);
        table.row(["-", "dé", "shut off"]);
        assert_eq!(
            table.format(true),
            " Id   Name   State\n-----------------------\n 1    test   running\n -    dé     shut off\n"
        );
        assert_eq!(
            table.format(false),
            " 1   test   running\n -   dé     shut off\n"
        );
    }

    #[test]
    fn wide_characters_take_two_columns() {
        let mut table = Table::new(&["Name", "State"]);
        table.row(["日本語", "running"]);
        table.row(["abc", "running"]);
        assert_eq!(
            table.format(true),
            " Name     State\n-------------------\n 日本語   running\n abc      running\n"
        );
    }

    #[test]
    fn the_last_cell_is_not_padded() {
        let mut table = Table::new(&["Id", "Title"]);
        table.row(["1", ""]);
        assert_eq!(table.format(true), " Id   Title\n-------------\n 1    \n");
    }

    #[test]
    fn control_characters_are_shown_as_their_bytes() {
        let mut table = Table::new(&["Name"]);
        table.row(["a\x1b[2Jb"]);
        assert_eq!(table.format(false), " a\\x1b[2Jb\n");
    }
}
