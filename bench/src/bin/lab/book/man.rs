// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Manual pages as pages of the book.
//!
//! Reads the macros of man(7) that this project's pages use, and fails on any other. The body is
//! HTML without blank lines, which Markdown passes through unchanged.

use anyhow::{Result, bail};

/// A manual page: "loopengine-run(1)" and its Markdown.
pub(super) struct Page {
    pub(super) title: String,
    pub(super) markdown: String,
}

/// Converts a page; `link` gives the address of the page NAME(SECTION), if the book has it.
pub(super) fn convert(roff: &str, link: &dyn Fn(&str, &str) -> Option<String>) -> Result<Page> {
    let mut writer = Writer { link, out: String::new(), text: String::new(), levels: vec![List::None] };
    let mut title = String::new();
    let mut lines = roff.lines();
    while let Some(line) = lines.next() {
        let Some((name, rest)) = macro_of(line) else {
            writer.add(&inline(line));
            continue;
        };
        let words = words(rest);
        match name {
            "TH" => {
                let [name, section, ..] = words.as_slice() else { bail!("no name and section in {line:?}") };
                title = format!("{}({section})", name.to_lowercase());
            }
            // They define the apostrophe.
            "ie" | "el" => {}
            "SH" => writer.heading(2, &capitalised(&words.join(" "))),
            "SS" => writer.heading(3, &words.join(" ")),
            "PP" => writer.paragraph(),
            "TP" => {
                let tag = lines.next().unwrap_or_default();
                let tag = macro_of(tag).map_or_else(|| Ok(inline(tag)), |(name, rest)| font(name, rest))?;
                writer.item(List::Terms, &tag);
            }
            "IP" => match words.first().map(String::as_str) {
                Some("\\(bu") => writer.item(List::Bullets, &[]),
                Some(tag) => writer.item(List::Terms, &inline(tag)),
                None => writer.end_paragraph(),
            },
            "RS" => writer.indent(),
            "RE" => writer.dedent(),
            "br" => writer.text.push_str("<br>"),
            "nf" => {
                let block: Vec<&str> = lines.by_ref().take_while(|line| *line != ".fi").collect();
                writer.block(&block)?;
            }
            _ => writer.add(&font(name, rest)?),
        }
    }
    writer.end_section();
    Ok(Page { markdown: format!("# {title}\n{}", writer.out), title })
}

/// What a level of indentation is at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum List {
    None,
    Terms,
    Bullets,
}

impl List {
    fn tags(self) -> (&'static str, &'static str) {
        match self {
            List::None => ("", ""),
            List::Terms => ("<dl>\n", "</dd>\n</dl>\n"),
            List::Bullets => ("<ul>\n", "</li>\n</ul>\n"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Font {
    Roman,
    Bold,
    Italic,
}

/// Text in one font.
type Run = (Font, String);

struct Writer<'a> {
    link: &'a dyn Fn(&str, &str) -> Option<String>,
    out: String,
    /// The paragraph that has begun.
    text: String,
    levels: Vec<List>,
}

impl Writer<'_> {
    fn add(&mut self, runs: &[Run]) {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        let html = self.html(runs);
        self.text.push_str(&html);
    }

    fn html(&self, runs: &[Run]) -> String {
        let plain: String = runs.iter().map(|(_, text)| text.as_str()).collect();
        if let Some((name, section)) = reference(plain.trim_end_matches([',', '.', ';', ':']))
            && let Some(address) = (self.link)(name, section)
        {
            let end = &plain[name.len() + section.len() + 2..];
            return format!("<a href=\"{address}\">{name}({section})</a>{end}");
        }
        let mut html = String::new();
        for (font, text) in runs.iter().filter(|(_, text)| !text.is_empty()) {
            match font {
                Font::Roman => html.push_str(&self.linked(text)),
                Font::Bold => html.push_str(&format!("<b>{}</b>", self.linked(text))),
                Font::Italic => html.push_str(&format!("<i>{}</i>", escape(text))),
            }
        }
        html
    }

    /// `text` with links to the manual pages that it names.
    fn linked(&self, text: &str) -> String {
        let mut words = Vec::new();
        for word in text.split(' ') {
            let inner = word.trim_start_matches('(').trim_end_matches([',', '.', ';', ':']);
            let inner = if inner.ends_with("))") { &inner[..inner.len() - 1] } else { inner };
            let address = reference(inner).and_then(|(name, section)| (self.link)(name, section));
            words.push(match address {
                Some(address) => {
                    escape(word).replacen(inner, &format!("<a href=\"{address}\">{inner}</a>"), 1)
                }
                None => escape(word),
            });
        }
        words.join(" ")
    }

    fn end_paragraph(&mut self) {
        let text = std::mem::take(&mut self.text);
        if !text.is_empty() {
            self.out.push_str(&format!("<p>{text}</p>\n"));
        }
    }

    fn end_list(&mut self) {
        self.end_paragraph();
        if let Some(level) = self.levels.last_mut() {
            self.out.push_str(level.tags().1);
            *level = List::None;
        }
    }

    fn paragraph(&mut self) {
        self.end_list();
    }

    fn item(&mut self, list: List, tag: &[Run]) {
        self.end_paragraph();
        let tag = self.html(tag);
        if self.levels.last() == Some(&list) {
            self.out.push_str(if list == List::Terms { "</dd>\n" } else { "</li>\n" });
        } else {
            self.end_list();
            self.out.push_str(list.tags().0);
            self.levels.pop();
            self.levels.push(list);
        }
        match list {
            List::Terms => self.out.push_str(&format!("<dt>{tag}</dt>\n<dd>\n")),
            _ => self.out.push_str("<li>\n"),
        }
    }

    fn indent(&mut self) {
        self.end_paragraph();
        self.levels.push(List::None);
    }

    fn dedent(&mut self) {
        self.end_list();
        if self.levels.len() > 1 {
            self.levels.pop();
        }
    }

    fn block(&mut self, lines: &[&str]) -> Result<()> {
        self.end_paragraph();
        let mut texts = Vec::new();
        for line in lines {
            let runs = match macro_of(line) {
                None => inline(line),
                Some(("PP" | "br", _)) => Vec::new(),
                Some((name, rest)) => font(name, rest)?,
            };
            texts.push(runs.iter().map(|(_, text)| escape(text)).collect::<String>());
        }
        // One line: a blank line would end the HTML block.
        self.out.push_str(&format!("<pre><code>{}</code></pre>\n", texts.join("&#10;")));
        Ok(())
    }

    fn end_section(&mut self) {
        while self.levels.len() > 1 {
            self.dedent();
        }
        self.end_list();
    }

    fn heading(&mut self, level: usize, text: &str) {
        self.end_section();
        let text: String = inline(text).iter().map(|(_, text)| escape(text)).collect();
        self.out.push_str(&format!("\n{} {text}\n\n", "#".repeat(level)));
    }
}

/// Name and arguments of the macro in `line`.
fn macro_of(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix('.')?;
    Some(line.split_once(' ').unwrap_or((line, "")))
}

/// The text of a font macro: .B and .I set all words, .BR and the like alternate.
fn font(name: &str, rest: &str) -> Result<Vec<Run>> {
    let of = |letter: char| match letter {
        'B' => Some(Font::Bold),
        'I' => Some(Font::Italic),
        'R' => Some(Font::Roman),
        _ => None,
    };
    let Some(fonts) = name.chars().map(of).collect::<Option<Vec<Font>>>().filter(|fonts| fonts.len() <= 2)
    else {
        bail!("macro .{name} is not supported: extend bench/src/bin/lab/book/man.rs");
    };
    if let [font] = fonts.as_slice() {
        return Ok(inline_in(&words(rest).join(" "), *font));
    }
    Ok(words(rest).iter().zip(fonts.iter().cycle()).flat_map(|(word, font)| inline_in(word, *font)).collect())
}

/// Arguments of a macro; quotes hold a word together.
fn words(rest: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = rest.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => {
                let blank = |(at, c): &(usize, char)| *c == ' ' && !rest[..*at].ends_with('\\');
                let end = rest.char_indices().find(blank).map_or(rest.len(), |(at, _)| at);
                rest.split_at(end)
            }
        };
        words.push(word.to_owned());
        rest = after.trim_start();
    }
    words
}

fn inline(text: &str) -> Vec<Run> {
    inline_in(text, Font::Roman)
}

/// Text with escapes, in `base` until it changes the font.
fn inline_in(text: &str, base: Font) -> Vec<Run> {
    let mut runs = vec![(base, String::new())];
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let mut push = |text: &str| {
            if let Some((_, run)) = runs.last_mut() {
                run.push_str(text);
            }
        };
        let Some(escape) = rest.strip_prefix('\\') else {
            push(c.encode_utf8(&mut [0; 4]));
            rest = &rest[c.len_utf8()..];
            continue;
        };
        let known: [(&str, &str); 8] = [
            ("*(Aq", "'"),
            ("(aq", "'"),
            ("(bu", "•"),
            ("(em", "—"),
            ("-", "-"),
            ("e", "\\"),
            ("&", ""),
            (" ", " "),
        ];
        if let Some((name, text)) = known.iter().find(|(name, _)| escape.starts_with(name)) {
            push(text);
            rest = &escape[name.len()..];
        } else if let Some(font) = escape.strip_prefix('f').and_then(|rest| rest.chars().next()) {
            let font = match font {
                'B' => Font::Bold,
                'I' => Font::Italic,
                _ => Font::Roman,
            };
            runs.push((font, String::new()));
            rest = &escape[2..];
        } else {
            push("\\");
            rest = escape.strip_prefix('\\').unwrap_or(escape);
        }
    }
    runs
}

/// Name and section of "loopengine-run(1)".
fn reference(word: &str) -> Option<(&str, &str)> {
    let (name, section) = word.strip_suffix(')')?.split_once('(')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let named = !name.is_empty() && name.chars().all(plain);
    (named && section.len() == 1 && section.chars().all(|c| c.is_ascii_digit())).then_some((name, section))
}

/// Text that neither Markdown nor HTML takes for markup.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '{' | '}' => safe.push_str(&format!("&#{};", u32::from(c))),
            c => safe.push(c),
        }
    }
    safe
}

/// "EXIT STATUS" as "Exit status".
fn capitalised(heading: &str) -> String {
    let mut letters = heading.chars();
    let first: String = letters.next().into_iter().collect();
    first + &letters.as_str().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markdown(roff: &str) -> String {
        let link = |name: &str, section: &str| (name == "b").then(|| format!("b.{section}.html"));
        convert(roff, &link).unwrap().markdown
    }

    #[test]
    fn converts_fonts_lists_and_examples() {
        let roff = ".TH A 1 \"\" x\n.SH NAME\na\\-b \\- does <it>\n.SH \"EXIT STATUS\"\n.TP\n\\fB\\-\\-max\\fR \\fI<N>\\fR\n\
            At most *N*, see b(1).\n.RS\n.IP \\(bu 2\none\n.IP \\(bu 2\ntwo\n.RE\n.TP\n.BI name= NAME\nIts name\n.PP\n.nf\nx\n\ny\n.fi\n";
        assert_eq!(
            markdown(roff),
            "# a(1)\n\n## Name\n\n<p>a-b - does &lt;it&gt;</p>\n\n## Exit status\n\n<dl>\n\
             <dt><b>--max</b> <i>&lt;N&gt;</i></dt>\n<dd>\n\
             <p>At most &#42;N&#42;, see <a href=\"b.1.html\">b(1)</a>.</p>\n<ul>\n<li>\n<p>one</p>\n</li>\n<li>\n<p>two</p>\n</li>\n</ul>\n\
             </dd>\n<dt><b>name=</b><i>NAME</i></dt>\n<dd>\n<p>Its name</p>\n</dd>\n</dl>\n<pre><code>x&#10;&#10;y</code></pre>\n"
        );
    }

    #[test]
    fn links_only_pages_of_the_book() {
        assert!(markdown(".TH A 1\n.BR b (1),\n").contains("<a href=\"b.1.html\">b(1)</a>,"));
        assert!(markdown(".TH A 1\n.BR mount (8)\n").contains("<b>mount</b>(8)"));
    }

    #[test]
    fn rejects_unknown_macros() {
        let error = convert(".TH A 1\n.TS\n", &|_, _| None).err().unwrap().to_string();
        assert!(error.contains(".TS"), "{error}");
    }
}
