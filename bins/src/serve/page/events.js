// Server-sent events of an answer to POST, which EventSource cannot make.

// Takes text as it comes, in pieces of any length, and gives whole events.
export class Parser {
  constructor() {
    this.rest = "";
  }

  push(text) {
    this.rest += text;
    const events = [];
    for (;;) {
      const end = /\r?\n\r?\n/.exec(this.rest);
      if (!end) return events;
      const block = this.rest.slice(0, end.index);
      this.rest = this.rest.slice(end.index + end[0].length);
      let name = "message";
      const data = [];
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (data.length) events.push({ name, data: JSON.parse(data.join("\n")) });
    }
  }
}

// Calls `told(name, data)` for each event of an answer, until it ends.
export async function follow(response, told) {
  const parser = new Parser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    for (const event of parser.push(value)) await told(event.name, event.data);
  }
}
