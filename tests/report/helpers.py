"""A page as a parser sees it."""

from html.parser import HTMLParser

SCRIPT = "<script>alert(1)</script>"
FIGURES = [
    *("held-out-loss", "matrix-loss", "matrix-accuracy", "matrix-cloze", "matrix-end-task", "loss-parts", "pace"),
    *("saturation", "overlap", "importance-1", "importance-2"),
]


class Page(HTMLParser):
    """Tags with their attributes, and the text of every table cell, paragraph, item and heading."""

    TEXTS = ("p", "li", "h1", "h2", "h3", "h4", "pre", "figcaption", "summary", "title", "dt", "dd")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.tables = [], [], [], []
        self.inside = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.inside.append(tag)
        elif tag in self.TEXTS:
            self.texts.append((tag, ""))
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside and self.inside[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self.inside:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)

    def of(self, *tags):
        return [text for tag, text in self.texts if tag in tags]

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def read(path):
    return Page(path.read_text(encoding="utf-8"))
