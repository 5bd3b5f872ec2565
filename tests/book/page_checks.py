"""What must hold on every page of the book, looked at in a real browser.

``inspect`` opens a page, looks at it in four views and returns its problems, a sentence each. ``test_page_checks.py``
proves for every check that a page with the fault is caught.
"""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

SIZES = {"phone": (390, 844), "desktop": (1400, 900)}
SCHEMES = ("light", "dark")

# One look at the finished page. Prose is text outside code and outside typeset mathematics.
LOOK = r"""() => {
  const found = {text: [], images: [], noAlt: [], tracebacks: 0, links: []};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (!node.parentElement.closest('pre, code, script, style, textarea, mjx-container'))
      found.text.push(node.data);
  }
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) found.images.push(image.currentSrc || image.src);
    // Outside the text the theme's mark may say nothing (alt=""), because its name stands beside it.
    if (image.closest('article') ? !image.alt.trim() : !image.hasAttribute('alt'))
      found.noAlt.push(image.src.slice(0, 80));
  }
  for (const svg of document.querySelectorAll('article svg[role=img], figure svg:not([role])'))
    if (!svg.closest('mjx-container') && !svg.getAttribute('aria-label') && !svg.querySelector('title'))
      found.noAlt.push('a drawing (svg)');
  for (const output of document.querySelectorAll('.cell_output'))
    if (/Traceback \(most recent call last\)/.test(output.textContent)) found.tracebacks += 1;
  found.mathErrors = document.querySelectorAll('mjx-merror, [data-mjx-error]').length;
  found.links = [...document.querySelectorAll('a[href]')].map(a => a.href);
  return found;
}"""
# Only tables and code may be wider than the window; they scroll in themselves. What a cell printed breaks its lines.
WIDTH = r"""() => {
  const found = {wide: []};
  found.scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (found.scroll > 0)
    for (const element of document.querySelectorAll('body *'))
      if (element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('table, pre'))
        found.wide.push(element.tagName.toLowerCase() + '.' + element.className);
  found.printed = [...document.querySelectorAll('.cell_output pre')]
    .filter(output => output.scrollWidth > output.clientWidth + 1).map(output => output.textContent.slice(0, 40));
  return found;
}"""
# A chapter has thousands of coloured words of code, which axe walks through for every rule. Of each kind (by the
# classes it stands in) one word in a block of code, or in a signature, is enough; the others become plain text of
# the block. What a formula is drawn of holds no text.
THIN_OUT = r"""() => {
  for (const drawing of document.querySelectorAll('mjx-container svg')) drawing.replaceChildren();
  for (const block of document.querySelectorAll('pre, dt.sig')) {
    const kinds = new Set();
    for (const word of block.querySelectorAll('span')) {
      if (word.childElementCount || [...word.attributes].some(attribute => attribute.name !== 'class')) continue;
      let kind = '';
      for (let element = word; element !== block; element = element.parentElement) kind += element.className + '<';
      if (kinds.has(kind)) word.replaceWith(...word.childNodes);
      kinds.add(kind);
    }
    block.normalize();
  }
}"""
# Contrast is what axe takes longest for, half a minute on some pages. It follows from a text's colour, size and
# weight, and from what lies behind it; of each such kind one text is marked, to be looked at for all. A view leaves
# out the kinds of earlier views, but for those of which axe could not tell.
AXE_RUN = r"""async options => {
  const kinds = window.kindsSeen ??= new Set(), marked = new Map();
  for (const element of document.querySelectorAll('body, body *')) {
    const words = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!words && !element.matches('input, select, textarea')) continue;
    if (!element.checkVisibility({visibilityProperty: true})) continue;
    const text = getComputedStyle(element);
    const kind = [text.color, text.fontSize, text.fontWeight, text.textShadow];
    for (let behind = element, covered = false; behind; behind = behind.parentElement) {
      const style = getComputedStyle(behind);
      kind.push(style.opacity, style.filter, style.mixBlendMode);
      if (covered) continue;
      kind.push(style.backgroundColor, style.backgroundImage);
      if (style.position !== 'static') kind.push(behind.className);  // it may lie over anything
      covered = /^rgb\(/.test(style.backgroundColor);
    }
    if (!kinds.has(kind.join())) marked.set(element, kind.join());
    kinds.add(kind.join());
  }
  if (options.runOnly && !marked.size) return [];
  for (const element of marked.keys()) element.setAttribute('data-kind', '');
  const found = await axe.run(document, options);
  for (const rule of found.incomplete.filter(rule => rule.id === 'color-contrast'))
    for (const node of rule.nodes) kinds.delete(marked.get(document.querySelector(node.target[0])));
  for (const element of marked.keys()) element.removeAttribute('data-kind');
  return found.violations;
}"""
# A link must look different from the text around it; whether it does by its colour is dear to find, and not asked,
# because all links are underlined. Regions are not reported below, and dear too.
RULES = r"""axe.configure({rules: [
  {id: 'color-contrast', selector: '[data-kind]'},
  {id: 'link-in-text-block', any: ['link-in-text-block-style']},
  {id: 'region', enabled: false},
]});"""
AXE = Axe().axe_script + RULES
RAW_MARKUP = re.compile(
    r"\$[^$\n]+\$|\\\(|\\\[|\\[a-zA-Z]{2,}|\{(?:ref|numref|eq|term|doc|cite(?::\w)?|func|class|mod)\}"
)


def inspect(page: Page, base: str, path: str, site: Path) -> list[str]:
    """Open one page of a served site and list what is wrong with it: on a phone and a desktop, light and dark.

    It is opened once, on a phone, and then made wider, as if the phone were turned: opening takes longer than
    looking.

    Args:
        page: a browser page; it may have shown another.
        base: the address of the site, ending in a slash.
        path: the page, relative to the site.
        site: the folder that is served.
    """
    problems: list[str] = []

    def requested(request):
        if not request.url.startswith((base, "data:", "blob:")):
            problems.append(f"asks the network for {request.url}")

    def answered(response):
        if response.status >= 400:
            problems.append(f"gets {response.status} for {response.url.removeprefix(base)}")

    def said(message):
        if message.type == "error":
            problems.append(f"console error: {message.text}")

    def failed(error):
        problems.append(f"script error: {error}")

    listeners = {"request": requested, "response": answered, "console": said, "pageerror": failed}
    for event, listener in listeners.items():
        page.on(event, listener)
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        if size == "phone":
            open_page(page, base + path, SCHEMES[0])
            problems += content(page, base, site)
            page.evaluate(THIN_OUT)
            page.evaluate(AXE)
        problems += [f"{size}: {problem}" for problem in sideways(page)]
        for scheme in SCHEMES:
            turn_to(page, scheme)
            found = accessibility(page, colours_only=scheme != SCHEMES[0])
            problems += [f"{size}, {scheme}: {problem}" for problem in found]
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return list(dict.fromkeys(problems))


def content(page: Page, base: str, site: Path) -> list[str]:
    """What is wrong on an open page however it is looked at."""
    found = page.evaluate(LOOK)
    problems = [
        f"raw markup on the page: {m.group()!r}" for text in found["text"] for m in RAW_MARKUP.finditer(text)
    ]
    problems += [f"image does not load: {image}" for image in found["images"]]
    problems += [f"image without alt text: {image}" for image in found["noAlt"]]
    problems += [f"{found['mathErrors']} formulas with an error"] if found["mathErrors"] else []
    problems += ["an output holds a traceback"] if found["tracebacks"] else []
    return problems + broken_links(found["links"], base, site)


def sideways(page: Page) -> list[str]:
    """Whether an open page is wider than its window, or a printed output than its box, and what sticks out."""
    found = page.evaluate(WIDTH)
    faults = [f"an output is cut at the right: {output!r}" for output in found["printed"]]
    if found["scroll"] > 0:
        faults.append(f"the page scrolls sideways by {found['scroll']} px: {', '.join(found['wide'][:4])}")
    return faults


def open_page(page: Page, address: str, scheme: str) -> None:
    """Open an address in a colour scheme and wait until it is finished: mathematics, fonts, no transition."""
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
    turn_to(page, scheme)


def turn_to(page: Page, scheme: str) -> None:
    """Ask an open page for a colour scheme, as a reader's system does in the evening; it must follow."""
    page.emulate_media(color_scheme=scheme)
    # The browser tells a page of the new scheme before it draws one of the next frames; a busy one is late.
    for _ in range(100):
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        theme = page.evaluate("document.documentElement.dataset.theme")
        if theme in (None, scheme):
            break
    assert theme in (None, scheme), f"{page.url} shows its {theme} theme to a reader who asks for {scheme}."


def broken_links(links: list[str], base: str, site: Path) -> list[str]:
    """Links into the site that lead to no file, or to no place in it."""
    broken = []
    for link in dict.fromkeys(links):
        if not link.startswith(base):
            continue
        parts = urlsplit(link)
        target = site / unquote(parts.path).lstrip("/")
        if target.is_dir():
            target /= "index.html"
        anchor = unquote(parts.fragment)
        if not target.is_file():
            broken.append(f"broken link: {link.removeprefix(base)}")
        elif anchor and target.suffix == ".html" and anchor not in anchors(target):
            broken.append(f"broken link, no such place on the page: {link.removeprefix(base)}")
    return broken


@cache
def anchors(page: Path) -> frozenset[str]:
    """All ids of a page."""
    return frozenset(re.findall(r'\bid="([^"]+)"', page.read_text("utf-8")))


def accessibility(page: Page, colours_only: bool) -> list[str]:
    """Serious and critical violations that axe-core finds on a page it is loaded in."""
    # Without preload axe does not fetch style sheets a second time, from addresses that do not exist.
    options = {"preload": False, "resultTypes": ["violations", "incomplete"]}
    if colours_only:
        options["runOnly"] = ["color-contrast"]
    return [
        f"accessibility, {violation['id']}: {violation['help']}: {violation['nodes'][0]['html'][:160]}"
        for violation in page.evaluate(AXE_RUN, options)
        if violation["impact"] in ("serious", "critical")
    ]
