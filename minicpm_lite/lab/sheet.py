"""A drawing whose numbers answer: point at one, and what it is made of lights up, with the sum written out.

    d = lab.Drawing("Two numbers and their product.")
    sheet = lab.Sheet(d)
    sheet.part(d.box(4, 4, 60, 24, "2"), "width", "2", "Given.")
    sheet.part(d.box(70, 4, 60, 24, "3"), "height", "3", "Given.")
    sheet.part(d.box(40, 50, 60, 24, "6"), "area", "6 = 2 × 3", made_of=("width", "height"))
    sheet

It works by mouse, touch and keyboard (Tab, then the arrow keys), in a page without a kernel or a network.
The sum stands beside the drawing, or below it on a phone, where it stays in view. A list, which the script
reads, holds all sums as text: for screen readers, on paper, and where scripts do not run.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from ..config import require_positive_number
from .drawing import Drawing
from .paths import short
from .places import Place, runs
from .style import KEEP_KEYS, THEME, css_color
from .svg import GROUND, UNFOLD, image

_ASK = "Point at a number, tap it, or use Tab and the arrow keys: here stands where it comes from."

# The sum sticks to the screen beside or below the drawing; a box that scrolls around both would take it away.
_STYLE = (
    "<style>:is(.output,.jp-OutputArea,.jp-OutputArea-child,.jp-OutputArea-output):has(.lab-sheet)"
    "{overflow:visible!important}"
    ".lab-sheet{margin:1rem 0;text-align:left}"
    ".lab-sheet>div{display:flex;flex-wrap:wrap;gap:0 1.25rem;justify-content:center}"
    ".lab-sheet :is(svg,img){flex:1 1 22rem;min-width:0;max-width:min(100%,28rem)!important;"
    "margin:0!important;height:auto}"
    f".lab-sheet aside{{flex:1 1 13rem;align-self:flex-start;position:sticky;top:30vh;bottom:0;"
    f"min-height:9rem;box-sizing:border-box;padding:.5rem 0;background:{GROUND};"
    "border-top:2px solid currentColor}"
    ".lab-sheet aside p{margin:0 0 .35rem;line-height:1.4}"
    ".lab-sheet .sum{font-variant-numeric:tabular-nums;font-weight:600;overflow-wrap:break-word}"
    ".lab-sheet aside button{width:2.75rem;height:2.75rem;font-size:1.1rem;margin-right:.25rem}"
    ".lab-sheet aside>div:last-child:not([hidden]){display:flex;align-items:center}"
    ".lab-sheet .part{fill:var(--ground);fill-opacity:0;cursor:pointer;outline:none}"
    ".lab-sheet .way{fill:none;stroke-width:1.3;pointer-events:none}"
    "@media screen{.lab-sheet .asked .part:not([data-look]){fill-opacity:.12}"
    ".lab-sheet [data-look=now]{stroke:currentColor;stroke-width:2.6}"
    f".lab-sheet :is([data-look=of],.way){{stroke:{css_color('purple')}}}"
    f".lab-sheet [data-look=of]{{stroke-width:2;fill:{css_color('purple')};fill-opacity:.12}}"
    f".lab-sheet [data-look=into]{{stroke:{css_color('orange')};stroke-width:1.6;stroke-dasharray:3 2.5}}}}"
    "@media(max-width:40rem){.lab-sheet aside{min-height:0;padding:.25rem 0;font-size:.85rem}"
    ".lab-sheet aside p{margin:0 0 .15rem;line-height:1.25}.lab-sheet aside small{display:none}"
    ".lab-sheet aside button{height:2.25rem}}"
    "@media print{.lab-sheet :is(.way,aside){display:none}}</style>"
)
_SCRIPT = (
    """(() => {
const sheet = document.currentScript.parentElement, panel = sheet.querySelector('aside');
const svg = ("""
    + UNFOLD
    + """)(sheet.querySelector('img'));
const make = (name, look) => {
const mark = document.createElementNS(svg.namespaceURI, name);
for (const key in look) mark.setAttribute(key, look[key]);
return svg.appendChild(mark); };
for (const drawn of svg.children) drawn.setAttribute('aria-hidden', true);
svg.setAttribute('role', 'listbox');
const parts = [...sheet.querySelectorAll('li')].map((item, place) => {
const [x, y, width, height] = item.dataset.at.split(' ').map(Number);
const mark = make('rect', {x, y, width, height, rx: 2, class: 'part', role: 'option',
'aria-label': item.querySelector('.name').textContent, 'aria-selected': false, tabindex: place ? -1 : 0});
return {item, mark, x, y, right: x + width, bottom: y + height, middle: [x + width / 2, y + height / 2],
of: item.dataset.of.split(' ').filter(Boolean).map(Number), stop: 'stop' in item.dataset}; });
const way = make('path', {class: 'way', 'aria-hidden': true});
svg.prepend(way);
const line = (from, to) => {
if (from.bottom <= to.y) { const [x, tip, half] = [from.middle[0], to.middle[0], (from.bottom + to.y) / 2];
return `M${x} ${from.bottom}C${x} ${half} ${tip} ${half} ${tip} ${to.y}`; }
const deep = Math.max(from.bottom, to.bottom) + 16;
return `M${from.middle[0]} ${from.bottom}C${from.middle[0]} ${deep} ${to.middle[0]} ${deep} ` +
`${to.middle[0]} ${to.bottom}`; };
let now, kept = false, timer = 0;
const ask = (part, moved) => {
if (part === now) return;
now = part; svg.classList.toggle('asked', Boolean(part));
for (const each of parts) {
const look = each === part ? 'now' : part?.of.includes(parts.indexOf(each)) ? 'of' :
each.of.includes(parts.indexOf(part)) ? 'into' : null;
if (look) each.mark.dataset.look = look; else delete each.mark.dataset.look;
each.mark.setAttribute('aria-selected', look === 'now');
if (part) each.mark.setAttribute('tabindex', look === 'now' ? 0 : -1); }
way.setAttribute('d', part ? part.of.map(place => line(parts[place], part)).join('') : '');
panel.firstElementChild.innerHTML = part ? part.item.innerHTML : panel.dataset.ask;
if (!moved || !part) return;
const end = innerHeight - (panel.getBoundingClientRect().left < svg.getBoundingClientRect().right ?
panel.offsetHeight : 0) - 8, start = 88;
const at = each => each.mark.getBoundingClientRect();
const own = at(part), of = part.of.map(place => at(parts[place]));
let top = Math.min(own.top, ...of.map(each => each.top));
const {bottom} = own;
if (bottom - top > end - start) top = own.top;
const by = bottom > end ? bottom - end : top < start ? top - start : 0;
let page = svg.parentElement;  /* what scrolls here: a notebook's own box, or the window */
while (page && !(page.scrollHeight > page.clientHeight &&
/auto|scroll/.test(getComputedStyle(page).overflowY))) page = page.parentElement;
if (by) (page ?? window).scrollBy({top: by, behavior:
matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'}); };
const under = event => {
const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
const far = part => Math.hypot(
Math.max(part.x - x, 0, x - part.right), Math.max(part.y - y, 0, y - part.bottom));
const near = parts.reduce((best, part) => far(part) < far(best) ? part : best);
return far(near) < (event.pointerType === 'mouse' ? 1 : 12) ? near : null; };
const stops = parts.filter(part => part.stop), [back, play, on] = panel.querySelectorAll('button');
const stop = () => { clearTimeout(timer); timer = 0;
play?.setAttribute('aria-label', 'Play'); };
const go = by => {
const at = parts.indexOf(now), next = by > 0 ? stops.find(part => parts.indexOf(part) > at) :
stops.findLast(part => parts.indexOf(part) < at);
if (next) { kept = true; ask(next, true); }
return next; };
const walk = () => {
if (!sheet.isConnected || !go(1)) return stop();
timer = setTimeout(walk, 1000 * sheet.dataset.seconds); };
panel.lastElementChild.hidden = false;
if (play) {
back.addEventListener('click', () => { stop(); go(-1); });
on.addEventListener('click', () => { stop(); go(1); });
play.addEventListener('click', () => {
if (timer) return stop();
if (!stops.some(part => parts.indexOf(part) > parts.indexOf(now))) ask(null);
play.setAttribute('aria-label', 'Pause'); walk(); }); }
svg.addEventListener('pointermove', event => {
if (event.pointerType === 'mouse' && !kept && !timer) { const part = under(event); if (part) ask(part); } });
svg.addEventListener('click', event => {
stop(); const part = under(event); kept = Boolean(part) && !(kept && part === now);
ask(part, event.pointerType === 'touch');
part?.mark.focus({preventScroll: true}); });
sheet.addEventListener('focusin', event => {
const part = parts.find(each => each.mark === event.target);
if (part && event.target.matches(':focus-visible')) { stop(); kept = true; ask(part, true); } });
svg.addEventListener('keydown', event => {
const here = now ?? parts[0], at = parts.indexOf(here), [x, y] = here.middle;
const above = {ArrowUp: -1, ArrowDown: 1}[event.key], beside = {ArrowLeft: -1, ArrowRight: 1}[event.key];
let next = beside ? parts[at + beside] : null;
if (above) {
const far = part => 10 * above * (part.middle[1] - y) + Math.abs(part.middle[0] - x);
next = parts.filter(part => above > 0 ? part.y >= here.bottom : part.bottom <= here.y)
.reduce((best, part) => best && far(best) <= far(part) ? best : part, null); }
if (event.key === 'Escape') { kept = false; ask(null); }
else if (event.key === 'Enter' || event.key === ' ') kept = !kept;
else if (!above && !beside) return;
event.preventDefault(); event.stopPropagation(); stop();
if (next) { next.mark.focus({preventScroll: true}); kept = true; ask(next, true); } });
ask(parts[sheet.dataset.start] ?? null);
})()"""
)


@dataclass(frozen=True)
class Part:
    """One number of a sheet."""

    place: Place
    sum: str
    says: str
    made_of: tuple[str, ...]
    stop: bool


class Sheet:
    """A drawing in which each number can be asked where it comes from. Make it the last expression of a cell.

    Args:
        drawing: what is shown; it may be drawn on until the sheet is shown.
        start: name of the number that is asked first; without one, none is.
        seconds: how long each stop is shown when the way through the sheet is played.

    Raises:
        ValueError: ``seconds`` is not above 0; or, when it is shown, it has no part, or none of the name
            ``start``.
    """

    def __init__(self, drawing: Drawing, *, start: str = "", seconds: float = 4) -> None:
        require_positive_number("seconds", seconds)
        self.drawing, self.start, self.seconds = drawing, start, seconds
        self.parts: dict[str, Part] = {}

    def part(
        self,
        place: Place,
        name: str,
        sum: str,
        says: str = "",
        *,
        made_of: Iterable[str] = (),
        stop: bool = False,
    ) -> Place:
        """Let a number answer.

        Args:
            place: what it covers in the drawing.
            name: what it is, in a few words; no other part has the same.
            sum: how it is worked out, with the numbers; ``_{q}`` and ``^{2}`` as in a drawing.
            says: what it means, in a sentence.
            made_of: names of the numbers it is worked out from, all given before.
            stop: the buttons that lead through the sheet stop here.

        Raises:
            ValueError: the name is empty or given twice, there is no sum, or it is made of what is not there.
        """
        made_of = tuple(made_of)
        if not name.strip() or name in self.parts:
            raise ValueError(f"The name is {name!r}; expected one that no other part has.")
        if not sum.strip():
            raise ValueError(f"{name!r} has no sum; expected how it is worked out, with the numbers.")
        if unknown := [each for each in made_of if each not in self.parts]:
            raise ValueError(f"{name!r} is made of {unknown[0]!r}; expected the names of earlier parts.")
        self.parts[name] = Part(place, sum, says, made_of, stop)
        return place

    def __repr__(self) -> str:
        lines = [f"Sheet: {self.drawing.alt}"]
        return "\n".join([*lines, *(f"{name}: {part.sum}" for name, part in self.parts.items())])

    def _repr_html_(self) -> str:
        if not self.parts:
            raise ValueError("The sheet has no part; expected at least one number that answers.")
        numbers = {name: number for number, name in enumerate(self.parts)}
        if self.start and self.start not in numbers:
            raise ValueError(f"start is {self.start!r}; expected the name of a part.")
        items = "".join(_item(name, part, numbers) for name, part in self.parts.items())
        start = numbers.get(self.start, "")
        return (
            f'{THEME}{_STYLE}<div class="lab-piece lab-picture lab-sheet" {KEEP_KEYS} data-start="{start}" '
            f'data-seconds="{self.seconds:g}"><div>{image(self.drawing.svg(), self.drawing.alt)}'
            f'<aside data-ask="<p>{_ASK}</p>"><div role="status"><p>Run this cell to ask the numbers; '
            f"all sums stand in the list below.</p></div>{self._buttons()}</aside></div>"
            f"<details><summary {KEEP_KEYS}>All numbers as text</summary><ol>{items}</ol></details>"
            f"<script>{_SCRIPT}</script></div>"
        )

    def _buttons(self) -> str:
        """The way through the stops, and what the frames say."""
        signs = [("Back", "‹", "lab-back"), ("Play", "", "lab-play"), ("On", "›", "lab-on")]
        signs *= any(part.stop for part in self.parts.values())
        buttons = "".join(
            f'<button type="button" {KEEP_KEYS} class="{look}" aria-label="{name}">{sign}</button>'
            for name, sign, look in signs
        )
        return f"<div hidden>{buttons}<small>framed: made of<br>dashed: goes into</small></div>"


def _item(name: str, part: Part, numbers: dict[str, int]) -> str:
    place = part.place
    at = " ".join(map(short, (place.x, place.y, place.width, place.height)))
    of = " ".join(str(numbers[each]) for each in part.made_of)
    says = f"<p>{_html(part.says)}</p>" if part.says else ""
    return (
        f'<li data-at="{at}" data-of="{of}"{" data-stop" * part.stop}><p class="name">{_html(name)}</p>'
        f'<p class="sum">{_html(part.sum)}</p>{says}</li>'
    )


def _html(text: str) -> str:
    """A text with what stands below and above the line; a product stays in one line.

    >>> _html("e^{2} < 8")
    'e<sup>2</sup> &lt; 8'
    """
    tags = {"": "{}", "_": "<sub>{}</sub>", "^": "<sup>{}</sup>"}
    return "".join(
        tags[where].format(escape(piece)) for piece, where in runs(text.replace(" × ", "\u00a0×\u00a0"))
    )
