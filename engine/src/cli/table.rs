// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables with aligned columns.

/// A table. The first row is the heading.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [bool],
}

impl Table {
    /// Creates a table from headings; `right` marks right-aligned columns.
    pub(super) fn new(heads: &[&'static str], right: &'static [bool]) -> Self {
        let head = heads.iter().map(|head| (*head).to_owned()).collect();
        Self { rows: vec![head], right }
    }

    /// Adds a row. Replaces control characters, which an image name may contain.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        let printable = |cell: String| {
            let map = |c: char| if c.is_control() { '?' } else { c };
            cell.chars().map(map).collect()
        };
        self.rows.push(cells.into_iter().map(printable).collect());
    }

    /// The table as text, one line per row, without trailing spaces.
    pub(super) fn render(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                let width = widths.get(column).copied().unwrap_or(0);
                match self.right.get(column) {
                    Some(true) => line.push_str(&format!("{cell:>width$}")),
                    _ => line.push_str(&format!("{cell:<width$}")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_columns() {
        let mut table = Table::new(&["NAME", "SIZE", "NOTE"], &[false, true]);
        table.row(vec!["a".into(), "10G".into(), String::new()]);
        table.row(vec!["longer".into(), "1.5K".into(), "x\n\u{1b}[31m".into()]);
        let want = "NAME    SIZE  NOTE\na        10G\nlonger  1.5K  x??[31m\n";
        assert_eq!(table.render(), want);
    }
}
