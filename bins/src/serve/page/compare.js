// Two pictures side by side, which scroll and grow together.

export class Compare {
  constructor(root) {
    this.root = root;
    this.panes = [...root.querySelectorAll(".pane")];
    this.zoom = root.querySelector("input");
    this.zoom.addEventListener("input", () => this.resize());
    for (const pane of this.panes) {
      pane.addEventListener("scroll", () => {
        for (const other of this.panes) {
          if (other === pane) continue;
          other.scrollLeft = pane.scrollLeft;
          other.scrollTop = pane.scrollTop;
        }
      });
    }
  }

  show(pictures) {
    pictures.forEach((picture, index) => {
      const image = this.panes[index].firstElementChild;
      image.src = picture.url;
      image.alt = picture.settings.prompt;
      const { model, seed, steps, cfg } = picture.settings;
      this.panes[index].nextElementSibling.textContent = `${model}, seed ${seed}, ${steps} steps, guidance ${cfg}`;
    });
    this.root.hidden = false;
    this.resize();
    this.root.scrollIntoView({ block: "nearest" });
  }

  resize() {
    for (const pane of this.panes) pane.firstElementChild.width = Math.round((pane.clientWidth || 200) * this.zoom.value);
  }
}
