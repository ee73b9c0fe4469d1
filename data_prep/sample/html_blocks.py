"""The running text of a documentation page, as blocks, without navigation, tables and listings of an interface."""

import re
from html.parser import HTMLParser

SKIP_TAGS = re.compile("script|style|nav|header|footer|table|form|button|svg|aside|head|select")
BLOCKS = re.compile("p|div|section|li|d[dtl]|[uo]l|blockquote|article|main|body|center|figure|figcaption|pre|h[1-6]|hr")
VOID = re.compile("br|img|hr|input|meta|link|col|wbr|area|source")
SKIP_NAMES = re.compile(
    # navigation and page furniture
    r"headerlink|hd|ft|global-nav|sphinxsidebar|related|nav(header|footer)|toc(tree-wrapper)?|contents|menu|searchmenu|up|top|toplang|"
    r"quickview|bottomlang|page-(header|footer)|comments_section|fancy_toc|fancy_title|tagline|browse-.*|toclink|"
    r".*breadcrumbs|sidebar.*|nosearch|linenos|eqno|admonition-title|anchor|copyright|sd-card|mermaid|"
    r"sphx-glr-(thumb.*|download.*|footer.*|timing|signature|script-out)|output_area|prompt|"
    # notes on versions, references, listings of an interface
    r"version(added|changed)|deprecated|seealso|citation|footnote.*|directive-(ref|summary)|field-list.*|"
    r"(py|c|cpp|std|rst) (function|method|class|attribute|data|exception|module|property|macro|type|var|member|option|"
    r"cmdoption|opcode|envvar|staticmethod|classmethod|struct|describe)"
)
Block = tuple[str, str]


class Page(HTMLParser):
    """Turns one HTML page into blocks (kind, text); kind is h1, h, dt, li, p, math or pre."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.text, self.kind = "", "p"
        self.skip_tag, self.skip_depth = "", 0
        self.root_tag, self.root_depth, self.done = "", 0, False

    def flush(self, kind: str = "p") -> None:
        if self.text.strip():
            self.blocks.append((self.kind, self.text))
        self.text, self.kind = "", kind

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attr = {key: value or "" for key, value in attrs}
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        names = [attr.get("class", ""), attr.get("id", ""), attr.get("role", "")]
        names += names[0].split()
        is_root = tag == "main" or attr.get("role") == "main" or attr.get("id") == "page-content"
        if is_root and not self.root_tag:
            self.blocks, self.text, self.root_tag, self.root_depth = [], "", tag, 1
            return
        self.root_depth += tag == self.root_tag
        named = tag not in ("html", "body") and any(SKIP_NAMES.fullmatch(name) for name in names if name)
        if self.done or SKIP_TAGS.fullmatch(tag) or named:
            if not VOID.fullmatch(tag):
                self.skip_tag, self.skip_depth = tag, 1
        elif BLOCKS.fullmatch(tag) and self.kind != "pre":
            kind = "h" if re.fullmatch("h[2-6]", tag) else tag if tag in ("h1", "dt", "li", "pre") else "p"
            if kind == "p" and self.kind == "li" and not self.text.strip():
                kind = "li"  # <li><p>
            self.flush("math" if "math" in names else kind)
        elif tag == "br":
            self.text += "\n"
        elif tag == "img" and "/math/" in attr.get("src", ""):
            self.text += f" ${attr.get('alt', '')}$ "  # formulas drawn as pictures keep their TeX here

    def handle_endtag(self, tag: str) -> None:
        if self.skip_tag:
            self.skip_depth -= tag == self.skip_tag
            self.skip_tag = self.skip_tag if self.skip_depth else ""
            return
        if tag == self.root_tag:
            self.root_depth -= 1
            self.done = self.done or self.root_depth == 0
        if BLOCKS.fullmatch(tag) and (self.kind != "pre" or tag == "pre"):
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.skip_tag and not self.done:
            self.text += data
