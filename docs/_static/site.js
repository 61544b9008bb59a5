// The filter of the catalog and the ten questions. Everything else on the site works without scripts.

function catalog(root) {
  const input = root.querySelector("#tag");
  const output = root.querySelector("output");
  const cards = [...root.querySelectorAll(".lesson")];
  const everything = output.textContent;

  function show() {
    const wanted = input.value.trim().toLowerCase();
    const tags = cards.map((card) => card.dataset.tags.toLowerCase().split("|"));
    const isTag = tags.some((own) => own.includes(wanted));
    let shown = 0;
    cards.forEach((card, index) => {
      const found = isTag ? tags[index].includes(wanted) : card.textContent.toLowerCase().includes(wanted);
      card.hidden = !found;
      shown += found;
      card.querySelectorAll(".tag").forEach((tag) => {
        tag.classList.toggle("on", wanted !== "" && tag.textContent.toLowerCase() === wanted);
      });
    });
    root.querySelectorAll(".shelf").forEach((shelf) => {
      shelf.hidden = !shelf.querySelector(".lesson:not([hidden])");
    });
    output.textContent = wanted ? `${shown} of ${cards.length}` : everything;
    history.replaceState(null, "", wanted ? `#tag=${encodeURIComponent(input.value.trim())}` : location.pathname);
  }

  input.addEventListener("input", show);
  input.form.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("click", (event) => {
    if (!event.target.matches(".tag")) return;
    const same = input.value === event.target.textContent;
    input.value = same ? "" : event.target.textContent;
    show();
    if (!same) input.scrollIntoView({ block: "center" });
  });
  const linked = location.hash.match(/^#tag=(.+)$/);
  if (linked) {
    input.value = decodeURIComponent(linked[1]);
    show();
  }
}

function quiz(form) {
  const notebooks = JSON.parse(document.getElementById("notebooks").textContent);
  const questions = [...form.querySelectorAll("fieldset")];
  const result = form.querySelector(".result");
  const empty = result.innerHTML;

  const link = (code) => {
    const label = `<span class="code">${code}</span> ${notebooks[code].title}`;
    return notebooks[code].there ? `<a href="notebooks/${code}.html">${label}</a>` : label;
  };

  function sumUp() {
    const answered = questions.filter((question) => question.dataset.answer);
    if (answered.length < questions.length) {
      const left = questions.length - answered.length;
      result.innerHTML = answered.length ? `<p>${left} ${left === 1 ? "question" : "questions"} to go.</p>` : empty;
      return;
    }
    const open = questions.filter((question) => question.dataset.answer === "wrong");
    const order = Object.keys(notebooks);
    const wanted = new Set(open.flatMap((question) => question.dataset.notebooks.split(" ")));
    const way = order.filter((code) => wanted.has(code));
    const right = questions.length - open.length;
    if (way.length === 0) {
      result.innerHTML =
        `<h2>${right} of ${questions.length}: the ideas are yours</h2><p>Then measure. Start with ${link("INF-03")} so that your ` +
        `numbers hold, read <a href="measured.html">which claims fail here</a>, and take notebooks whose verdict surprises you.</p>`;
      return;
    }
    const minutes = way.reduce((sum, code) => sum + notebooks[code].minutes, 0);
    const rest = way.slice(1).map((code) => `<li>${link(code)}, ${notebooks[code].minutes} min</li>`).join("");
    const reason = right <= 3 ? "Take the course in order; from the beginning it needs nothing that you do not have." : "";
    result.innerHTML =
      `<h2>${right} of ${questions.length}. Start with ${link(right <= 3 ? order[0] : way[0])}</h2><p>${reason}</p>` +
      (rest ? `<p>Then, in this order (${minutes} minutes for all of it); skip what you know:</p><ol>${rest}</ol>` : "");
  }

  form.addEventListener("change", (event) => {
    const question = event.target.closest("fieldset");
    const chosen = event.target.closest("label");
    question.dataset.answer = chosen.className;
    question.querySelectorAll("label").forEach((label) => {
      label.querySelector("input").disabled = true;
      label.querySelector(".why").hidden = label !== chosen && label.className !== "right";
      label.toggleAttribute("data-chosen", label === chosen);
    });
    question.querySelector(".where").hidden = false;
    sumUp();
  });
  form.addEventListener("reset", () => {
    questions.forEach((question) => {
      delete question.dataset.answer;
      question.querySelectorAll("label").forEach((label) => {
        label.removeAttribute("data-chosen");
        label.querySelector("input").disabled = false;
        label.querySelector(".why").hidden = true;
      });
      question.querySelector(".where").hidden = true;
    });
    result.innerHTML = empty;
    window.scrollTo({ top: 0 });
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const shelf = document.getElementById("catalog");
  if (shelf) catalog(shelf);
  const form = document.getElementById("quiz");
  if (form) quiz(form);
});
