// Pictures that were drawn, with their settings, in the browser's own store.

const MOST = 200;
const MOST_BYTES = 300e6;

function asked(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

export class History {
  static async open() {
    const history = new History();
    try {
      const request = indexedDB.open("l2p", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
      history.store = await asked(request);
    } catch {
      // A private window may have no store; then pictures last as long as the page.
      history.kept = new Map();
      history.next = 1;
    }
    return history;
  }

  pictures(mode) {
    return this.store.transaction("pictures", mode).objectStore("pictures");
  }

  // The newest first.
  async all() {
    const all = this.kept ? [...this.kept.values()] : await asked(this.pictures("readonly").getAll());
    return all.sort((a, b) => b.id - a.id);
  }

  // Keeps a picture; the oldest go for it.
  async add(picture) {
    if (this.kept) {
      picture.id = this.next++;
      this.kept.set(picture.id, picture);
    } else {
      picture.id = await asked(this.pictures("readwrite").add(picture));
    }
    let bytes = 0;
    for (const [place, one] of (await this.all()).entries()) {
      bytes += one.blob.size;
      if (place >= MOST || bytes > MOST_BYTES) await this.remove(one.id);
    }
    return picture;
  }

  async remove(id) {
    if (this.kept) this.kept.delete(id);
    else await asked(this.pictures("readwrite").delete(id));
  }
}
