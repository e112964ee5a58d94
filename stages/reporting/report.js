"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // -- theme: follows the system until the button says otherwise ---------------------------------
  const themes = ["auto", "light", "dark"];
  const themeButton = byId("theme");
  const remember = (value) => { try { localStorage.setItem("pixloom-theme", value); } catch { /* file:// may refuse */ } };
  const recall = () => { try { return localStorage.getItem("pixloom-theme"); } catch { return null; } };
  const setTheme = (name) => {
    if (name === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = name;
    themeButton.textContent = `Theme: ${name}`;
    themeButton.dataset.value = name;
  };
  setTheme(themes.includes(recall()) ? recall() : "auto");
  themeButton.addEventListener("click", () => {
    const next = themes[(themes.indexOf(themeButton.dataset.value) + 1) % themes.length];
    setTheme(next);
    remember(next);
  });

  // -- copy --------------------------------------------------------------------------------------
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = byId(button.dataset.copy);
      try { await navigator.clipboard.writeText(source.textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(source); button.textContent = "Selected"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // -- filter and order --------------------------------------------------------------------------
  const list = byId("cards");
  if (!list) return;
  const cards = [...list.children];
  const number = (card, name) => (name in card.dataset ? Number(card.dataset[name]) : NaN);
  const shown = () => [...list.children].filter((card) => !card.hidden);

  const apply = () => {
    const text = byId("find").value.trim().toLowerCase();
    const split = byId("split").value;
    const group = byId("group").value;
    const pick = byId("pick").value;
    const [metric, direction] = byId("order").value.split(" ");
    const sign = direction === "up" ? 1 : -1;
    for (const card of cards) {
      const data = card.dataset;
      card.hidden = !(data.key.toLowerCase().includes(text)
        && (!split || data.split === split) && (!group || data.group === group)
        && (!pick || data.pick.split(" ").includes(pick)));
    }
    const ordered = [...cards].sort((a, b) => {
      const x = number(a, metric), y = number(b, metric);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    });
    list.append(...ordered);
    byId("count").textContent = `${shown().length} of ${cards.length} pictures`;
  };
  for (const id of ["find", "split", "group", "pick", "order"]) byId(id).addEventListener("input", apply);
  apply();

  // -- one picture, large ------------------------------------------------------------------------
  const dialog = byId("viewer"), slider = byId("slider"), edge = byId("edge");
  const left = byId("left"), right = byId("right"), under = byId("under"), over = byId("over");
  let current = null;
  const pictureOf = (card, role) => card.querySelector(`img[data-role="${role}"]`);

  const cut = () => {
    const share = Number(slider.value);
    over.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    edge.style.left = `${share}%`;
    slider.setAttribute("aria-valuetext", `${share} % ${left.value}, ${100 - share} % ${right.value}`);
  };
  const draw = () => {
    for (const [image, select] of [[over, left], [under, right]]) {
      const picture = pictureOf(current, select.value);
      image.hidden = !picture;
      if (picture) { image.src = picture.src; image.alt = `${select.value} of ${current.dataset.key}`; }
    }
    byId("viewer-key").textContent = current.dataset.key;
    byId("viewer-scores").textContent = current.querySelector(".scores").textContent.trim().replace(/\s+/g, " ");
    cut();
  };
  const open = (card) => {
    current = card;
    for (const select of [left, right]) {
      for (const option of select.options) option.disabled = !pictureOf(card, option.value);
    }
    draw();
    if (!dialog.open) dialog.showModal();
    slider.focus();
  };
  const step = (by) => {
    const visible = shown();
    const place = visible.indexOf(current);
    if (visible.length) open(visible[(place + by + visible.length) % visible.length]);
  };
  const only = (role, share) => { left.value = role; slider.value = share; draw(); };

  list.addEventListener("click", (event) => {
    const card = event.target.closest(".card");
    if (card) open(card);
  });
  list.addEventListener("keydown", (event) => {
    const card = event.target.closest(".card");
    const visible = shown();
    const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!card || by === undefined) return;
    const next = visible[visible.indexOf(card) + by];
    if (next) { next.querySelector("button").focus(); event.preventDefault(); }
  });
  slider.addEventListener("input", cut);
  left.addEventListener("input", draw);
  right.addEventListener("input", draw);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => current?.querySelector("button").focus());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (event.target.tagName === "SELECT") return;
      const role = left.options[Number(event.key) - 1];
      const act = { n: () => step(1), p: () => step(-1) }[event.key]
        ?? (role && !role.disabled ? () => only(role.value, 100) : null);
      if (act) { act(); event.preventDefault(); }
    } else if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      byId("find").focus();
      event.preventDefault();
    }
  });
})();
