"use strict";
// Fills each list from its JSON, filtered by the choices and the search, a page at a time. Texts are only ever set as text.
for (const list of document.querySelectorAll(".list")) {
  const items = JSON.parse(list.querySelector("script").textContent);
  const perPage = list.id === "pictures" ? 48 : 20;
  const selects = [...list.querySelectorAll("select")];
  const search = list.querySelector("input");
  let page = 0;

  for (const select of selects) {
    const values = [...new Set(items.map((item) => item[select.dataset.field]))].filter((value) => value).sort();
    for (const value of values) {
      const option = document.createElement("option");
      option.value = option.textContent = value;
      select.append(option);
    }
  }

  const element = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    parent.append(made);
    return made;
  };

  const picture = (item, parent) => {
    const figure = element("figure", "", parent);
    if (item.picture) {
      const image = element("img", "", figure);
      image.src = "data:image/jpeg;base64," + item.picture;
      image.alt = item.file;
      image.loading = "lazy";
      image.addEventListener("click", () => figure.classList.toggle("open"));
    } else {
      element("p", item.file + " cannot be read", figure);
    }
    const about = [item.sub_class, item.language, item.seed === null ? "" : "seed " + item.seed];
    element("figcaption", item.prompt + " — " + about.filter((part) => part).join(", "), figure);
  };

  const refusal = (item, parent) => {
    const line = element("p", "", parent);
    element("b", item.rule, line);
    line.append(" (" + [item.stage, item.sub_class].join(", ") + ") " + item.reason + ": " + item.text);
  };

  const show = () => {
    const words = search.value.toLowerCase();
    const found = items.filter(
      (item) =>
        selects.every((select) => !select.value || item[select.dataset.field] === select.value) &&
        (item.prompt ?? item.text).toLowerCase().includes(words),
    );
    const pages = Math.max(1, Math.ceil(found.length / perPage));
    page = Math.min(Math.max(page, 0), pages - 1);
    const target = list.querySelector(".items");
    target.replaceChildren();
    for (const item of found.slice(page * perPage, (page + 1) * perPage)) {
      (list.id === "pictures" ? picture : refusal)(item, target);
    }
    list.querySelector(".place").textContent = "page " + (page + 1) + " of " + pages + ", " + found.length + " found";
    list.querySelector(".back").disabled = page === 0;
    list.querySelector(".next").disabled = page === pages - 1;
  };

  const first = () => {
    page = 0;
    show();
  };
  selects.forEach((select) => select.addEventListener("change", first));
  search.addEventListener("input", first);
  list.querySelector(".back").addEventListener("click", () => {
    page -= 1;
    show();
  });
  list.querySelector(".next").addEventListener("click", () => {
    page += 1;
    show();
  });
  show();
}
