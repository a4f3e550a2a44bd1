// A picture to begin with, and a mask that is painted over it: white is drawn anew, black stays.

const MOST_STEPS = 30;

export class Board {
  constructor(picture, mask, changed) {
    this.picture = picture;
    this.mask = mask;
    // What is painted is read often: for steps back, and for whether there is anything.
    this.paper = mask.getContext("2d", { willReadFrequently: true });
    this.changed = changed;
    this.radius = 12;
    this.erases = false;
    this.steps = [];
    let last = null;
    mask.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      event.preventDefault();
      mask.setPointerCapture(event.pointerId);
      this.remember();
      last = this.place(event);
      this.stroke(last, last);
    });
    mask.addEventListener("pointermove", (event) => {
      if (!last) return;
      const place = this.place(event);
      this.stroke(last, place);
      last = place;
    });
    for (const name of ["pointerup", "pointercancel"]) {
      mask.addEventListener(name, () => {
        if (last) this.changed();
        last = null;
      });
    }
  }

  // Shows a picture at its own size, with nothing painted.
  show(image) {
    for (const canvas of [this.picture, this.mask]) {
      canvas.width = image.width;
      canvas.height = image.height;
    }
    this.picture.getContext("2d").drawImage(image, 0, 0);
    this.steps = [];
    this.changed();
  }

  place(event) {
    const box = this.mask.getBoundingClientRect();
    return [((event.clientX - box.left) * this.mask.width) / box.width, ((event.clientY - box.top) * this.mask.height) / box.height];
  }

  stroke([x, y], [u, v]) {
    const context = this.paper;
    context.globalCompositeOperation = this.erases ? "destination-out" : "source-over";
    context.strokeStyle = "#fff";
    context.lineCap = "round";
    // Of the picture's shorter side, in hundredths.
    context.lineWidth = Math.max(1, (this.radius * Math.min(this.mask.width, this.mask.height)) / 100);
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(u + 0.01, v);
    context.stroke();
  }

  remember() {
    this.steps.push(this.pixels());
    if (this.steps.length > MOST_STEPS) this.steps.shift();
  }

  pixels() {
    return this.paper.getImageData(0, 0, this.mask.width, this.mask.height);
  }

  undo() {
    const step = this.steps.pop();
    if (step) this.paper.putImageData(step, 0, 0);
    this.changed();
  }

  clear() {
    this.remember();
    this.paper.clearRect(0, 0, this.mask.width, this.mask.height);
    this.changed();
  }

  invert() {
    this.remember();
    const pixels = this.pixels();
    for (let index = 3; index < pixels.data.length; index += 4) {
      pixels.data[index] = pixels.data[index] > 127 ? 0 : 255;
      pixels.data[index - 3] = pixels.data[index - 2] = pixels.data[index - 1] = 255;
    }
    this.paper.putImageData(pixels, 0, 0);
    this.changed();
  }

  isPainted() {
    return this.pixels().data.some((value, index) => index % 4 === 3 && value > 127);
  }

  // The mask as a PNG in base64: white and black, without anything between.
  toBase64() {
    const canvas = document.createElement("canvas");
    canvas.width = this.mask.width;
    canvas.height = this.mask.height;
    const pixels = this.pixels();
    for (let index = 0; index < pixels.data.length; index += 4) {
      pixels.data.fill(pixels.data[index + 3] > 127 ? 255 : 0, index, index + 3);
      pixels.data[index + 3] = 255;
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  }
}
