"""The drawings of the course: `python site/drawings.py` writes them to nbs/images, one SVG each.

All share one style: blue is the image, orange are the words, green is where both have met. Each drawing stands on a
card of its own and follows the reader's light or dark mode, so it can be read on any page. A box that stands for a
part of the library says which one in `data-symbol`; tests/test_drawings.py looks every one of them up.
"""

import re
from dataclasses import dataclass
from html import escape
from math import hypot
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "images"
WIDTH = 800
LIGHT = dict(card="#ffffff", edge="#d0d7de", text="#1f2328", quiet="#57606a")
DARK = dict(card="#161b22", edge="#3d444d", text="#e6edf3", quiet="#a8b1bb")
KINDS = {  # kind of box -> (fill, stroke) in light mode, the same in dark mode
    "image": (("#dce9f7", "#2f66a8"), ("#1c3350", "#7fb2ea")),
    "words": (("#fce6d5", "#b3571d"), ("#4a2c16", "#f0a468")),
    "both": (("#dff0e3", "#2f7a45"), ("#1d3b27", "#7ecb92")),
    "plain": (("#f2f4f6", "#6e7781"), ("#262c34", "#9da7b1")),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def style() -> str:
    "The colours of both modes."

    def mode(colors: dict[str, str], which: int) -> str:
        rules = [
            f".card {{ fill: {colors['card']}; stroke: {colors['edge']}; }}",
            f"text {{ fill: {colors['text']}; }} .quiet {{ fill: {colors['quiet']}; }}",
            f".flow {{ stroke: {colors['quiet']}; }} .flow-head {{ fill: {colors['quiet']}; }}",
            f".halo {{ stroke: {colors['card']}; }}",
        ]
        for kind, both in KINDS.items():
            fill, stroke = both[which]
            rules.append(f".{kind} {{ fill: {fill}; stroke: {stroke}; }}")
            rules.append(f".{kind}-line {{ stroke: {stroke}; }} .{kind}-head {{ fill: {stroke}; }}")
        return "\n".join(rules)

    return (
        f"text {{ font-family: {FONT}; font-size: 13px; text-anchor: middle; }}\n"
        ".name { font-weight: 600; font-size: 13.2px; } .start { text-anchor: start; }\n"
        ".line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }\n"
        ".halo { fill: none; stroke-width: 7; } .dashed { stroke-dasharray: 5 4; }\n"
        f"{mode(LIGHT, 0)}\n@media (prefers-color-scheme: dark) {{\n{mode(DARK, 1)}\n}}"
    )


@dataclass(frozen=True)
class Box:
    "Where a box lies, and points on its sides."

    x: float
    y: float
    w: float
    h: float

    def left(self, part: float = 0.5) -> tuple[float, float]:
        return self.x, self.y + part * self.h

    def right(self, part: float = 0.5) -> tuple[float, float]:
        return self.x + self.w, self.y + part * self.h

    def top(self, part: float = 0.5) -> tuple[float, float]:
        return self.x + part * self.w, self.y

    def bottom(self, part: float = 0.5) -> tuple[float, float]:
        return self.x + part * self.w, self.y + self.h


class Drawing:
    "One SVG, put together box by box; 800 units wide."

    def __init__(
        self,
        name: str,  # of the file
        title: str,  # what it shows, in a few words
        description: str,  # the same for those who cannot see it
        height: float,
    ) -> None:
        self.name, self.title, self.description, self.height = name, title, description, height
        self.parts: list[str] = []

    def box(
        self,
        where: tuple[float, float, float, float],  # x, y, width, height
        kind: str,  # of `KINDS`
        name: str = "",  # bold; may be empty
        *lines: str,  # below the name
        symbol: str = "",  # the part of `refseg_nb` that it stands for
        dashed: bool = False,
    ) -> Box:
        "A rounded box with its text in the middle."
        box = Box(*where)
        data = f' data-symbol="refseg_nb.{symbol}"' if symbol else ""
        self.parts.append(
            f'<g{data}><rect class="{kind}{" dashed" if dashed else ""}" x="{box.x:g}" y="{box.y:g}"'
            f' width="{box.w:g}" height="{box.h:g}" rx="7" stroke-width="1.4"/>'
        )
        texts = [("name", name)] * bool(name) + [("", line) for line in lines]
        top = box.y + box.h / 2 - 17 * (len(texts) - 1) / 2 + 4.6
        for i, (cls, text) in enumerate(texts):
            self.text(box.x + box.w / 2, top + 17 * i, text, cls)
        self.parts.append("</g>")
        return box

    def circle(self, x: float, y: float, sign: str, kind: str = "plain") -> Box:
        "A sum, a product."
        self.parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="13" stroke-width="1.4"/>')
        self.text(x, y + 6, sign, "name")
        return Box(x - 13, y - 13, 26, 26)

    def text(self, x: float, y: float, text: str, cls: str = "", turn: float = 0) -> None:
        "A line of text; {_2} is a subscript and {^v} a superscript."
        pieces, shift = [], 0
        for piece in re.split(r"(\{[_^][^}]*\})", text):
            if not piece:
                continue
            small = piece.startswith("{")
            to = {"{_": 4, "{^": -5}.get(piece[:2], 0)
            dy = f' dy="{to - shift:g}"' if to != shift else ""
            size = ' font-size="10.5"' if small else ""
            shown = escape(piece[2:-1] if small else piece, quote=False)
            pieces.append(f"<tspan{dy}{size}>{shown}</tspan>" if dy or size else shown)
            shift = to
        about = f' transform="rotate({turn:g} {x:g} {y:g})"' if turn else ""
        named = f' class="{cls}"' if cls else ""
        self.parts.append(f'<text{named} x="{x:g}" y="{y:g}"{about}>{"".join(pieces)}</text>')

    def line(self, *points: tuple[float, float], kind: str = "", dashed: bool = False) -> None:
        "A line through points, without a head."
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        cls = f"{kind}-line" if kind else "flow"
        self.parts.append(f'<path class="line {cls}{" dashed" if dashed else ""}" d="{path}"/>')

    def arrow(
        self,
        *points: tuple[float, float],
        kind: str = "",  # whose colour; empty: grey
        over: bool = False,  # it crosses other lines: they are interrupted
        dashed: bool = False,
    ) -> None:
        "An arrow through points; its tip touches the last one."
        *before, (x0, y0), (x, y) = points
        length = hypot(x - x0, y - y0)
        dx, dy = (x - x0) / length, (y - y0) / length
        foot = x - 8 * dx, y - 8 * dy
        if over:
            (ax, ay), (bx, by), *rest = *before, (x0, y0), foot
            part = 3 / hypot(bx - ax, by - ay)  # the box that it leaves keeps its side
            start = ax + part * (bx - ax), ay + part * (by - ay)
            path = "M" + " L".join(f"{a:g} {b:g}" for a, b in (start, (bx, by), *rest))
            self.parts.append(f'<path class="halo" d="{path}"/>')
        self.line(*before, (x0, y0), foot, kind=kind, dashed=dashed)
        corners = [(x, y), (foot[0] - 4.5 * dy, foot[1] + 4.5 * dx), (foot[0] + 4.5 * dy, foot[1] - 4.5 * dx)]
        shape = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        self.parts.append(f'<polygon class="{kind or "flow"}-head" points="{shape}"/>')

    def span(self, x: float, end: float, y: float, text: str) -> None:
        "A bracket with a label above what it spans."
        self.line((x, y + 14), (x, y + 8), (end, y + 8), (end, y + 14))
        self.text((x + end) / 2, y, text, "quiet")

    def scene(self, x: float, y: float, scale: float = 1, mask: bool = False) -> Box:
        "A small picture of three boats, 84 x 64; or the mask of one of them."
        boats = ((14, 42, "#c8442f"), (48, 42, "#2e8b57"), (69, 54, "#c8442f"))
        sky, sea = ("#1b1b1b", "#1b1b1b") if mask else ("#cfe4f5", "#5b93c7")
        self.parts.append(f'<g transform="translate({x:g} {y:g}) scale({scale:g})">')
        self.parts.append(f'<rect width="84" height="64" fill="{sky}"/>')
        self.parts.append(f'<rect y="34" width="84" height="30" fill="{sea}"/>')
        for i, (cx, cy, color) in enumerate(boats):
            fill = "#ffffff" if mask else color
            if mask and i != 2:
                continue
            self.parts.append(
                f'<path fill="{fill}" d="M{cx - 11} {cy} h22 l-4 7 h-14 z M{cx} {cy - 2} v-17 l9 17 z"/>'
            )
        self.parts.append('<rect width="84" height="64" fill="none" stroke="#6e7781"/></g>')
        return Box(x, y, 84 * scale, 64 * scale)

    def legend(self, x: float, y: float) -> None:
        "What the colours mean."
        for i, (kind, label) in enumerate(
            (("image", "image"), ("words", "words"), ("both", "both have met"))
        ):
            at = x + (0, 72, 146)[i]
            self.parts.append(
                f'<rect class="{kind}" x="{at:g}" y="{y - 11:g}" width="14" height="14" rx="3"/>'
            )
            self.text(at + 20, y + 1, label, "start quiet")

    def svg(self) -> str:
        "The file."
        inside = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" width="{WIDTH}"'
            f' height="{self.height:g}" role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{escape(self.title)}</title>\n'
            f'<desc id="desc">{escape(self.description)}</desc>\n<style>\n{style()}\n</style>\n'
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1:g}" rx="10"/>\n'
            f"{inside}\n</svg>\n"
        )


def shnet() -> Drawing:
    "Figure 2 of the paper, with the library's names."
    d = Drawing(
        "shnet",
        "SHNet, from an image and a phrase to a mask",
        "A frozen backbone turns the image into three levels. Three level adapters bring them to one shape,"
        " C times H times W. This happens once per image. For each phrase, a text encoder turns its words into T"
        " vectors of C numbers. SFM lets all positions and all words of a level attend to one another. HCAM lets"
        " the three levels exchange what they found, through gates, and joins them with a 3-D convolution."
        " ASPP and an up-sampling decoder turn the joined map into the mask.",
        372,
    )
    d.span(16, 320, 30, "encode: once per image")
    d.span(346, 784, 30, "segment: once per phrase")
    image = d.scene(16, 126.5, 0.86)
    backbone = d.box((110, 62, 82, 184), "image", "Backbone", "frozen", symbol="models.backbones.Backbone")
    sfm = d.box(
        (346, 62, 104, 184),
        "both",
        "SFM",
        "each position",
        "and each word",
        "attends to all",
        "of both",
        symbol="models.sfm.SFM",
    )
    hcam = d.box(
        (486, 62, 108, 184),
        "both",
        "HCAM",
        "gates between",
        "the levels,",
        "then one map",
        symbol="models.hcam.HCAM",
    )
    d.arrow(image.right(), backbone.left())
    d.text(52, 200, "image", "quiet")
    for i, part in enumerate((1 / 6, 3 / 6, 5 / 6)):
        y = backbone.right(part)[1]
        adapter = d.box(
            (212, y - 23, 112, 46),
            "image",
            "LevelAdapter",
            f"V{{_{i + 2}}}: C × H × W",
            symbol="models.decoder.LevelAdapter",
        )
        d.arrow(backbone.right(part), adapter.left())
        d.arrow(adapter.right(), sfm.left(part))
        d.arrow(sfm.right(part), hcam.left(part))
        d.text(467, y - 7, f"f{{_{i + 2}}}")
    aspp = d.box((632, 62, 152, 52), "both", "ASPP", "looks near and far", symbol="models.decoder.ASPP")
    decoder = d.box(
        (632, 142, 152, 52),
        "both",
        "UpsampleDecoder",
        "logits: 4H × 4W",
        symbol="models.decoder.UpsampleDecoder",
    )
    y = aspp.left()[1]
    d.arrow((hcam.x + hcam.w, y), aspp.left())
    d.text(612, y - 7, "G")
    d.arrow(aspp.bottom(), decoder.top())
    mask = d.scene(708 - 42, 222, 1, mask=True)
    d.arrow(decoder.bottom(), mask.top())
    d.text(708, 303, "mask", "quiet")
    phrase = d.box((16, 290, 176, 56), "words", "", "“the boat closest", "to the green boat”")
    text = d.box((212, 290, 112, 56), "words", "TextEncoder", "L: T × C", symbol="models.text.TextEncoder")
    d.arrow(phrase.right(), text.left(), kind="words")
    d.arrow(text.right(), (sfm.bottom()[0], text.right()[1]), sfm.bottom(), kind="words")
    d.legend(486, 348)
    return d


def sfm() -> Drawing:
    "Equation 1."
    d = Drawing(
        "sfm",
        "SFM: one attention over pixels and words, in four blocks",
        "The map V is flattened into H times W pixel vectors, and the T word vectors L are put behind them. After"
        " LayerNorm and the addition of positions, every vector attends to all of them. The matrix of attention"
        " has four blocks: pixels look at pixels, pixels look at words, words look at pixels, words look at"
        " words. Each row goes through one softmax over pixels and words together. The result is cut again into"
        " a map and words.",
        400,
    )
    d.text(60, 60, "V: C × H × W")
    for i in range(16):
        d.parts.append(
            f'<rect class="image" x="{24 + 18 * (i % 4)}" y="{72 + 18 * (i // 4)}" width="18" height="18"/>'
        )
    d.text(60, 268, "L: T × C")
    for i, word in enumerate(("the", "boat", "…", "boat")):
        d.box((24, 278 + 22 * i, 72, 22), "words", "", word)
    for i in range(16):
        d.parts.append(f'<rect class="image" x="150" y="{72 + 12 * i}" width="26" height="12"/>')
    for i in range(4):
        d.parts.append(f'<rect class="words" x="150" y="{278 + 22 * i}" width="26" height="22"/>')
    d.text(163, 60, "X")
    d.arrow((96, 108), (148, 108), kind="image")
    d.text(122, 100, "flatten", "quiet")
    d.arrow((96, 322), (148, 322), kind="words")
    ready = d.box((200, 176, 88, 76), "plain", "", "LayerNorm,", "then + P{_v}", "and + P{_l}")
    d.arrow((176, 214), ready.left())
    x, y = 336, 92
    d.arrow(ready.right(), (x - 2, 214))
    d.text(x - 12, y + 204, "queries: who looks", "quiet", turn=-90)
    d.text(x + 164, 36, "JointAttention", "name")
    d.text(x + 164, 56, "keys: what is looked at", "quiet")
    d.text(x + 100, 82, "H·W pixels", "quiet")
    d.text(x + 266, 82, "T words", "quiet")
    d.parts.append('<g data-symbol="refseg_nb.models.sfm.JointAttention">')
    d.box(
        (x, y, 200, 168),
        "image",
        "pixels → pixels",
        "What belongs to the",
        "same object? What",
        "lies beside it?",
    )
    d.box((x + 204, y, 124, 168), "both", "pixels → words", "Am I what", "the phrase", "means?")
    d.box((x, y + 172, 200, 92), "both", "words → pixels", "Where is what I name?")
    d.box((x + 204, y + 172, 124, 92), "words", "words → words", "Which noun", "do I belong to?")
    d.parts.append("</g>")
    d.text(x + 164, 380, "each row: one softmax, over pixels and words together", "quiet")
    v = d.box((704, 130, 82, 60), "both", "f{^v}", "C × H × W")
    l = d.box((704, 290, 82, 60), "both", "f{^l}", "T × C")
    d.arrow((x + 328, v.left()[1]), v.left())
    d.arrow((x + 328, l.left()[1]), l.left())
    return d


def hcam() -> Drawing:
    "Equations 2 and 3."
    d = Drawing(
        "hcam",
        "HCAM: what level 2 takes from levels 3 and 4",
        "A gate computes Lambda 23 from the map of level 2 and the averaged words of level 3. It multiplies the"
        " map of level 3, and the product is added to the map of level 2. The same happens with level 4: Lambda"
        " 24, from the map of level 2 and the averaged words of level 4, multiplies the map of level 4. The sum"
        " is g 2. g 3 and g 4 are made in the same way. A 3-D convolution turns the three into one map, G.",
        396,
    )
    f2 = d.box((16, 42, 120, 48), "both", "f{_2}{^v}", "map of level 2")
    rows = []
    for i, top in ((3, 122), (4, 258)):
        words = d.box((16, top, 120, 48), "words", f"f{{_{i}}}{{^l}}", "averaged words")
        map_ = d.box((16, top + 66, 120, 48), "both", f"f{{_{i}}}{{^v}}", f"map of level {i}")
        gate = d.box(
            (222, top - 4, 144, 56),
            "plain",
            "Gate",
            f"Λ{{_2{i}}} = σ(Conv[· ; ·])",
            symbol="models.hcam.Gate",
        )
        rows.append((words, map_, gate))
    plus = d.circle(482, 66, "+")
    d.arrow(f2.right(), plus.left())
    d.line((186, 66), (186, 268))
    for words, map_, gate in rows:
        d.arrow((186, gate.left(0.25)[1]), gate.left(0.25))
        y = gate.left(0.7)[1]
        d.arrow((words.right()[0], y), gate.left(0.7), kind="words", over=True)
        times = d.circle(420, map_.right()[1], "×")
        d.arrow(map_.right(), times.left(), over=True)
        d.arrow(gate.right(), (420, gate.right()[1]), times.top())
        d.line(times.right(), (482, times.right()[1]))
    d.arrow((482, rows[1][1].right()[1]), plus.bottom())
    d.parts.append('<circle class="flow-head" cx="186" cy="66" r="3.5"/>')
    d.parts.append(f'<circle class="flow-head" cx="482" cy="{rows[0][1].right()[1]:g}" r="3.5"/>')
    join = d.box(
        (636, 42, 116, 330),
        "both",
        "Conv3dLevels",
        "3 × 3 × 3",
        "over the stack",
        "of three",
        symbol="models.hcam.Conv3dLevels",
    )
    g2 = d.box((530, 42, 76, 48), "both", "g{_2}")
    d.arrow(plus.right(), g2.left())
    d.arrow(g2.right(), (join.x, g2.right()[1]))
    for i, top in ((3, 188), (4, 324)):
        g = d.box((530, top, 76, 48), "both", f"g{{_{i}}}", "likewise", dashed=True)
        d.arrow(g.right(), (join.x, g.right()[1]))
    d.arrow(join.right(), (784, join.right()[1]))
    d.text(768, join.right()[1] - 9, "G")
    d.text(76, 28, "from SFM", "quiet")
    d.text(294, 28, "how much may pass, 0 to 1", "quiet")
    d.text(482, 28, "level 2 takes in", "quiet")
    return d


def decoder() -> Drawing:
    "ASPP and the up-sampling decoder, with the published numbers."
    d = Drawing(
        "decoder",
        "From one map to a mask: ASPP and the up-sampling decoder",
        "ASPP sends the map G, C times H times W, through five branches side by side: a 1 by 1 convolution, three"
        " 3 by 3 convolutions whose taps lie 6, 12 and 24 positions apart, and the mean of the whole map. The"
        " five results are concatenated and brought back to C channels. The decoder then alternates 3 by 3"
        " convolutions with bilinear doublings, from H to 2H to 4H positions a side, and ends with one logit per"
        " pixel.",
        330,
    )
    d.span(96, 410, 30, "ASPP")
    d.span(440, 784, 30, "UpsampleDecoder")
    g = d.box((14, 146, 58, 60), "both", "G", "C×H×W")
    d.parts.append('<g data-symbol="refseg_nb.models.decoder.ASPP">')
    stack = Box(300, 60, 18, 232)
    for i, (label, step) in enumerate(
        (
            ("1 × 1", 0),
            ("3 × 3, rate 6", 5),
            ("3 × 3, rate 12", 9),
            ("3 × 3, rate 24", 14),
            ("mean of the map", -1),
        )
    ):
        branch = d.box((100, 60 + 48 * i, 170, 40), "both")
        d.text(162, branch.y + 24.5, label)
        x, y = 245, branch.y + 20
        if step < 0:
            d.parts.append(f'<rect class="both-head" x="{x - 14}" y="{y - 14}" width="28" height="28"/>')
        taps = {-1: [], 0: [(0, 0)]}.get(step, [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])
        for dx, dy in taps:
            d.parts.append(f'<circle class="both-head" cx="{x + dx * step}" cy="{y + dy * step:g}" r="1.9"/>')
        d.arrow(g.right(), (86, 176), (86, branch.left()[1]), branch.left())
        d.arrow(branch.right(), (stack.x, branch.right()[1]))
    d.box((stack.x, stack.y, stack.w, stack.h), "both")
    project = d.box((344, 146, 64, 60), "both", "", "1 × 1", "to C")
    d.parts.append("</g>")
    d.text(309, 310, "5C channels", "quiet")
    d.arrow(stack.right(), project.left())
    d.parts.append('<g data-symbol="refseg_nb.models.decoder.UpsampleDecoder">')
    small = d.box((440, 161, 30, 30), "both")
    middle = d.box((520, 146, 60, 60), "both")
    large = d.box((630, 116, 120, 120), "both")
    d.parts.append("</g>")
    d.arrow(project.right(), small.left())
    d.arrow(small.right(), middle.left())
    d.arrow(middle.right(), large.left())
    for x in (493, 603):
        d.text(x, 168, "double", "quiet")
    for box, side, convs in (
        (small, "H", ("3 × 3", "512")),
        (middle, "2H", ("3 × 3", "512")),
        (large, "4H", ("3 × 3, three times:", "512, 256, 1")),
    ):
        x = box.x + box.w / 2
        d.text(x, 258, side, "name")
        for i, line in enumerate(convs):
            d.text(x, 278 + 17 * i, line)
    d.scene(639, 139, 1.22, mask=True)
    d.text(690, 106, "one logit per pixel", "quiet")
    return d


def cmpc() -> Drawing:
    "CMPC, and where words enter."
    d = Drawing(
        "cmpc",
        "CMPC: words enter after the backbone, in three steps",
        "The word reader sorts the words of a phrase by what they do. At each of three levels of a frozen"
        " backbone, MUTAN fuses the map with q, the sum of entity and attribute words: it perceives. The relation"
        " graph sends messages between positions through the relation words: it reasons. Then the three levels"
        " exchange channels under s, all necessary words, a ConvLSTM reads them one after the other, and a"
        " convolution gives the mask, enlarged eightfold.",
        396,
    )
    image = d.scene(16, 82.4, 0.8)
    backbone = d.box((102, 62, 84, 92), "image", "Backbone", "frozen", symbol="models.backbones.Backbone")
    for shift in (12, 6):
        d.parts.append(
            f'<rect class="card" x="{206 + shift}" y="{44 - shift}" width="258" height="124" rx="9"/>'
        )
    d.parts.append('<g data-symbol="refseg_nb.models.cmpc.Level">')
    d.parts.append('<rect class="card" x="206" y="44" width="258" height="124" rx="9"/>')
    d.text(341, 24, "Level, once for each of three", "quiet")
    d.parts.append("</g>")
    mutan = d.box((220, 62, 96, 92), "both", "MUTAN", "1 perceive:", "products", symbol="models.cmpc.MUTAN")
    graph = d.box(
        (338, 62, 116, 92),
        "both",
        "RelationGraph",
        "2 reason:",
        "messages",
        symbol="models.cmpc.RelationGraph",
    )
    tgfe = d.box(
        (490, 62, 104, 92),
        "both",
        "WideTGFE",
        "3 exchange",
        "between levels",
        symbol="models.cmpc.WideTGFE",
    )
    lstm = d.box(
        (620, 62, 164, 92),
        "both",
        "PeepholeConvLSTM",
        "reads the levels,",
        "then 3 × 3 and ×8",
        symbol="models.cmpc.PeepholeConvLSTM",
    )
    d.arrow(image.right(), (backbone.x, image.right()[1]))
    d.arrow((186, 108), mutan.left())
    d.arrow(mutan.right(), graph.left())
    d.arrow(graph.right(), tgfe.left(), over=True)
    d.arrow(tgfe.right(), lstm.left())
    mask = d.scene(660, 196, 1, mask=True)
    d.arrow(lstm.bottom(), mask.top())
    d.text(702, 277, "mask", "quiet")
    phrase = d.box((16, 216, 166, 52), "words", "", "“the boat closest", "to the green boat”")
    reader = d.box(
        (16, 306, 166, 64),
        "words",
        "WordReader",
        "LSTM; four shares",
        "for each word",
        symbol="models.cmpc.WordReader",
    )
    d.arrow(phrase.bottom(), reader.top(), kind="words")
    for target, wide, name, lines in (
        (mutan, 110, "q", ("entities and", "attributes")),
        (graph, 110, "w{_t}, p{^rel}", ("words, by their", "relation share")),
        (tgfe, 112, "s", ("all that is", "necessary")),
    ):
        x = target.bottom()[0]
        chip = d.box((x - wide / 2, 216, wide, 72), "words", name, *lines)
        d.arrow(reader.right(), (x, reader.right()[1]), chip.bottom(), kind="words")
        d.arrow(chip.top(), target.bottom(), kind="words", over=True)
    d.legend(520, 374)
    return d


def lavt() -> Drawing:
    "LAVT, and where words enter."
    d = Drawing(
        "lavt",
        "LAVT: words enter inside the image encoder, after each stage",
        "The image runs through four stages of a Swin. After each stage, the pixel-word attention module PWAM lets"
        " every position collect the words of BERT that matter to it, and gives the map F. After the first three"
        " stages a gate S decides how much of F is added to the map, so the next stage already computes with the"
        " words. The decoder reads the four F from coarse to fine.",
        404,
    )
    x = [108 + 156 * i for i in range(4)]
    image = d.scene(16, 48.5, 0.86)
    sizes = ("¼ of the size", "⅛", "¹⁄₁₆", "¹⁄₃₂")
    swin = [
        d.box(
            (at, 48, 92, 56),
            "image" if i == 1 else "both",
            f"Stage {i}",
            size,
            symbol="models.lavt.SwinStage",
        )
        for i, (at, size) in enumerate(zip(x, sizes), 1)
    ]
    d.arrow(image.right(), swin[0].left())
    phrase = d.box((14, 160, 80, 70), "words", "", "“the boat", "closest to", "…”")
    bert = d.box((14, 264, 80, 46), "words", "BERT", "T × D", symbol="models.text.bert_encoder")
    d.arrow(phrase.bottom(), bert.top(), kind="words")
    decoder = d.box(
        (x[0], 342, x[3] + 92 - x[0], 44),
        "both",
        "TopDownDecoder",
        "begins with the coarsest F and joins the next finer one at each step",
        symbol="models.lavt.TopDownDecoder",
    )
    bus = bert.right()[1]
    d.line(bert.right(), (x[3] + 28, bus), kind="words")
    for i, stage in enumerate(swin):
        pwam = d.box(
            (stage.x, 160, 92, 70), "both", "PWAM", "positions", "ask words", symbol="models.lavt.PWAM"
        )
        d.arrow(stage.bottom(), pwam.top())
        d.text(stage.x + 60, 136, f"V{{_{i + 1}}}")
        d.arrow((stage.x + 28, bus), (stage.x + 28, pwam.y + pwam.h), kind="words")
        down = stage.x + 72
        d.arrow((down, pwam.y + pwam.h), (down, decoder.y), kind="both", over=True)
        d.text(down + 14, 326, f"F{{_{i + 1}}}")
        if i < 3:
            plus = d.circle(stage.x + 126, stage.right()[1], "+")
            gate = d.box(
                (stage.x + 105, 170, 42, 50), "both", "", "S × F", symbol="models.lavt.language_gate"
            )
            d.arrow(pwam.right(), gate.left())
            d.arrow(gate.top(), plus.bottom(), kind="both")
            d.arrow(stage.right(), plus.left())
            d.arrow(plus.right(), swin[i + 1].left())
    mask = d.scene(716, 336, 0.86, mask=True)
    d.arrow(decoder.right(), (mask.x, decoder.right()[1]))
    d.text(730, 190, "S: a gate,", "quiet")
    d.text(730, 208, "−1 to 1", "quiet")
    return d


def crossvlt() -> Drawing:
    "CrossVLT, and where words enter."
    d = Drawing(
        "crossvlt",
        "CrossVLT: a language and a vision encoder that take turns",
        "Two rows of four stages. The upper row reads the words, the lower row is a Swin that reads the image."
        " Downwards, the positions of each vision stage ask the words of the language stage above it. Upwards,"
        " the words of the next language stage ask the positions of the vision stage before it. After the first"
        " three vision stages the map is merged to half its size and asks the words once more. A decoder reads"
        " what the four vision stages have heard.",
        404,
    )
    x = [102 + 156 * i for i in range(4)]
    wide = 120
    language = [
        d.box(
            (at, 48, wide, 60),
            "words" if i == 0 else "both",
            "BERT" if i == 0 else "LanguageStage",
            f"words {i + 1}",
            symbol="models.text.bert_encoder" if i == 0 else "models.crossvlt.LanguageStage",
        )
        for i, at in enumerate(x)
    ]
    vision = []
    for i, at in enumerate(x):
        vision.append(
            d.box(
                (at, 192, wide, 76),
                "both",
                f"Stage {i + 1}",
                "asks the words" if i == 3 else "asks, merges,",
                *(() if i == 3 else ("asks again",)),
                symbol="models.lavt.SwinStage",
            )
        )
    phrase = d.box((12, 48, 76, 60), "words", "", "“the boat", "closest …”")
    image = d.scene(14, 202.5, 0.86)
    d.arrow(phrase.right(), language[0].left(), kind="words")
    d.arrow(image.right(), (vision[0].x, image.right()[1]), kind="image")
    decoder = d.box(
        (x[0], 338, x[3] + wide - x[0], 46),
        "both",
        "TopDownDecoder",
        "the same as LAVT's: from the coarsest map to the finest",
        symbol="models.lavt.TopDownDecoder",
    )
    for i in range(4):
        d.arrow(language[i].bottom(0.3), vision[i].top(0.3), kind="words")
        d.arrow(vision[i].bottom(), (vision[i].bottom()[0], decoder.y), kind="both")
        d.text(vision[i].bottom()[0] + 16, 308, f"F{{_{i + 1}}}")
        if i < 3:
            d.arrow(language[i].right(), language[i + 1].left(), kind="words")
            d.arrow(vision[i].right(), vision[i + 1].left())
            d.arrow(vision[i].top(0.86), language[i + 1].bottom(0.1), kind="both")
    mask = d.scene(716, 334, 0.86, mask=True)
    d.arrow(decoder.right(), (mask.x, decoder.right()[1]))
    d.text(704, 138, "↓ positions", "start quiet")
    d.text(704, 154, "ask words", "start quiet")
    d.text(704, 180, "↑ words ask", "start quiet")
    d.text(704, 196, "positions", "start quiet")
    return d


DRAWINGS = (shnet, sfm, hcam, decoder, cmpc, lavt, crossvlt)


def main() -> None:
    "Write all of them."
    FOLDER.mkdir(exist_ok=True)
    for make in DRAWINGS:
        drawing = make()
        (FOLDER / f"{drawing.name}.svg").write_text(drawing.svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
