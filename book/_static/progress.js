/* Keeps what a reader did, in this browser and nowhere else: the answers of a quiz, the exercises that are done,
   the chapters that were read. A mark in the contents shows the last two; the end of a chapter lets one forget. */
document.addEventListener('DOMContentLoaded', () => {
  const PREFIX = 'minicpm_lite:';
  const root = new URL(document.documentElement.dataset.content_root, location.href).href;
  const pageOf = address => address.split(/[?#]/)[0].slice(root.length);
  let store;
  try {
    store = localStorage;
  } catch {
    return;  // the reader forbids pages to keep anything
  }
  const load = page => ({answers: {}, done: [], read: false, ...JSON.parse(store.getItem(PREFIX + page) ?? '{}')});

  function markContents() {
    for (const link of document.querySelectorAll('.bd-links a.reference.internal')) {
      const {done, total, read} = load(pageOf(link.href));
      link.querySelector('.progress-mark')?.remove();
      if (!read && !done.length) continue;
      const mark = document.createElement('span');
      mark.className = 'progress-mark';
      mark.textContent = read ? '✓ read' : `${done.length} of ${total}`;
      link.append(' ', mark);
    }
  }
  markContents();

  const exercises = [...document.querySelectorAll('.bd-article .exercise[id]')];
  if (!exercises.length) return;
  const page = pageOf(location.href);
  const state = load(page);
  state.total = exercises.length;

  function save() {
    store.setItem(PREFIX + page, JSON.stringify(state));
    markContents();
  }

  function checkbox(text, checked, changed) {
    const label = document.createElement('label');
    const box = document.createElement('input');
    box.type = 'checkbox';
    box.checked = checked;
    box.addEventListener('change', () => { changed(box.checked); save(); });
    label.className = 'kept';
    label.append(box, ` ${text}`);
    return label;
  }

  function button(text, forget) {
    const element = document.createElement('button');
    element.type = 'button';
    element.textContent = text;
    element.addEventListener('click', () => { forget(); location.reload(); });
    return element;
  }

  for (const exercise of exercises)
    exercise.append(checkbox('I have done this exercise', state.done.includes(exercise.id), done => {
      state.done = state.done.filter(id => id !== exercise.id).concat(done ? exercise.id : []);
    }));

  for (const option of document.querySelectorAll('fieldset[data-right] input[type=radio]')) {
    if (state.answers[option.name] === option.value) {
      option.checked = true;
      option.dispatchEvent(new Event('change', {bubbles: true}));  // the quiz answers as it did then
    }
    option.addEventListener('change', () => { state.answers[option.name] = option.value; save(); });
  }

  const end = document.createElement('div');
  const note = document.createElement('p');
  end.className = 'progress-kept';
  note.textContent = 'Answers and marks are kept in this browser only.';
  end.append(
    checkbox('I have read this chapter', state.read, read => { state.read = read; }),
    note,
    button('Forget those of this chapter', () => store.removeItem(PREFIX + page)),
    button('Forget all of them', () => {
      for (const key of Object.keys(store)) if (key.startsWith(PREFIX)) store.removeItem(key);
    }),
  );
  document.querySelector('.bd-article').append(end);
});
