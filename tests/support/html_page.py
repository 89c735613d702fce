"""What an HTML page holds, for tests of it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed page: its tags, the addresses they ask for, its cells and its text."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.identifiers: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}:
                self.addresses.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
