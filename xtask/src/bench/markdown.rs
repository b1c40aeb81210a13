//! Tables that are read in a terminal and on a page.

/// A table; every column but the first stands to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(String::as_str);
        cells.chain(header.get(column).copied()).map(str::len).max().unwrap_or(0).max(3)
    };
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.enumerate().map(|(column, cell)| match column {
            0 => format!(" {cell:<0$} |", width(0)),
            _ => format!(" {cell:>0$} |", width(column)),
        });
        format!("|{}\n", cells.collect::<String>())
    };
    let rule = (0..header.len()).map(|column| match column {
        0 => format!(" {} |", "-".repeat(width(0))),
        _ => format!(" {}: |", "-".repeat(width(column) - 1)),
    });
    let mut text = line(&mut header.iter().copied());
    text += &format!("|{}\n", rule.collect::<String>());
    rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
    text
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "12345".to_owned()]];
        let expected = "| way  |    ns |\n| ---- | ----: |\n| a    |     1 |\n| long | 12345 |\n";
        assert_eq!(table(&["way", "ns"], &rows), expected);
    }
}
