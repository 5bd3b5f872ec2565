/* Shows the title of a link to a term or a citation as a box: at once, for the keyboard too, and so that the
   pointer may rest on it. Escape closes it. The title stays in its place for screen readers, and is taken away
   only while the pointer is on the link, lest the browser show it a second time. */
document.addEventListener('DOMContentLoaded', () => {
  const box = document.createElement('div');
  box.className = 'hover-note';
  box.hidden = true;
  box.setAttribute('aria-hidden', 'true');
  document.body.append(box);
  let closing;

  function show(link, text) {
    clearTimeout(closing);
    box.textContent = text;
    box.hidden = false;
    const place = link.getClientRects()[0];
    const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
    const above = place.bottom + box.offsetHeight + 8 > innerHeight;
    box.style.left = `${Math.max(8, left) + scrollX}px`;
    box.style.top = `${(above ? place.top - box.offsetHeight - 4 : place.bottom + 4) + scrollY}px`;
  }
  const hide = () => { box.hidden = true; };
  const hideSoon = () => { closing = setTimeout(hide, 200); };

  for (const link of document.querySelectorAll('.bd-article a.reference[title]')) {
    const text = link.title;
    link.addEventListener('pointerenter', event => {
      if (event.pointerType === 'touch') return;
      link.removeAttribute('title');
      show(link, text);
    });
    link.addEventListener('pointerleave', () => { link.title = text; hideSoon(); });
    link.addEventListener('focus', () => { if (link.matches(':focus-visible')) show(link, text); });
    link.addEventListener('blur', hide);
  }
  box.addEventListener('pointerenter', () => clearTimeout(closing));
  box.addEventListener('pointerleave', hideSoon);
  document.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
});
