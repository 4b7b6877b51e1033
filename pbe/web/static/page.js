// Boards to paint masks and to crop exemplars on, the viewer of results, and the examples.
// Gradio mounts each piece of HTML by window.pbe.mount; the Paint button asks window.pbe.collect.
(() => {
  "use strict";
  const COLOUR = "#ff2d78";
  const SMALL = 400; // images below this many pixels a side are shown with crisp pixels
  const LARGE = 1024; // from here on a small mask is better edited by its surroundings
  const UNDO = 30;
  const boards = {};
  let lastBoard = "image";

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  async function upload(file, kind) {
    const form = new FormData();
    form.append("file", file, "upload");
    form.append("kind", kind);
    return answer(await fetch("files", { method: "POST", body: form }));
  }

  async function answer(response) {
    const told = await response.json().catch(() => ({}));
    if (response.ok) return told;
    throw new Error(typeof told.detail === "string" ? told.detail : `The server refused this (${response.status}).`);
  }

  async function picture(name) {
    const image = new Image();
    image.src = `files/${name}.png`;
    await image.decode();
    return image;
  }

  class Board {
    constructor(root) {
      this.root = root;
      this.kind = root.dataset.kind;
      this.stage = root.querySelector(".pbe-stage");
      [this.image, this.mask, this.over] = root.querySelectorAll("canvas");
      this.items = []; // {name, picture, crop}; the image's board has one at most
      this.active = 0;
      this.tool = this.kind === "image" ? "brush" : "box";
      this.cursor = null; // in pixels of the picture
      this.start = null;
      this.maskFile = null;
      this.past = [];
      this.future = [];
      root.addEventListener("click", (event) => this.clicked(event));
      root.addEventListener("change", (event) => this.chosen(event.target));
      root.addEventListener("pointerdown", () => { lastBoard = this.kind; });
      this.stage.addEventListener("focus", () => { lastBoard = this.kind; });
      this.stage.addEventListener("keydown", (event) => this.key(event));
      this.stage.addEventListener("pointerdown", (event) => this.down(event));
      this.stage.addEventListener("pointermove", (event) => this.move(event));
      this.stage.addEventListener("pointerup", () => this.up());
      this.stage.addEventListener("pointercancel", () => this.up());
      this.stage.addEventListener("pointerleave", () => { if (!this.start) { this.cursor = null; this.draw(); } });
      this.stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
      this.stage.addEventListener("dragover", (event) => event.preventDefault());
      this.stage.addEventListener("drop", (event) => {
        event.preventDefault();
        this.open([...event.dataTransfer.files]);
      });
      new ResizeObserver(() => this.draw()).observe(this.stage);
      this.draw();
    }

    get item() { return this.items[this.active]; }
    get slider() { return this.root.querySelector("[data-size]"); }
    get radius() { // of the brush, in pixels of the picture
      return Math.max((Number(this.slider.value) / 300) * Math.max(this.mask.width, this.mask.height) / 2, 0.5);
    }

    say(text, problem = false) {
      const said = this.root.querySelector(".pbe-said");
      said.textContent = text;
      said.classList.toggle("pbe-problem", problem);
    }

    async open(files, kind = this.kind) {
      this.say("Loading …");
      try {
        for (const file of kind === "exemplar" ? files : files.slice(0, 1)) {
          const { name, width, height } = await upload(file, kind);
          const shown = await picture(name);
          if (kind === "mask") this.setMask(shown, name);
          else this.add(name, shown, width, height);
        }
        if (kind === "mask") this.hint();
      } catch (error) {
        this.say(error.message, true);
      }
    }

    add(name, shown, width, height) {
      if (this.kind === "image") this.items = [];
      this.items.push({ name, picture: shown, crop: null });
      this.show(this.items.length - 1);
      const large = this.kind === "image" && Math.max(width, height) > LARGE;
      const advice = large ? " For a small mask take its surroundings: Settings, What the model sees." : "";
      this.say(`${width} × ${height} pixels.${advice}`);
    }

    show(index) {
      this.active = clamp(index, 0, Math.max(this.items.length - 1, 0));
      const shown = this.item?.picture;
      for (const canvas of [this.image, this.mask]) {
        canvas.width = shown?.naturalWidth ?? 1;
        canvas.height = shown?.naturalHeight ?? 1;
        canvas.classList.toggle("pbe-crisp", Math.max(canvas.width, canvas.height) < SMALL);
      }
      if (shown) this.image.getContext("2d").drawImage(shown, 0, 0);
      this.root.classList.toggle("pbe-filled", Boolean(shown));
      if (this.kind === "image") { this.past = []; this.future = []; this.maskFile = null; }
      this.strip();
      this.draw();
    }

    strip() {
      if (this.kind !== "exemplar") return;
      const strip = this.root.querySelector(".pbe-strip");
      strip.replaceChildren(...this.items.flatMap((item, index) => {
        const button = document.createElement("button");
        button.type = "button";
        button.dataset.item = index;
        button.setAttribute("aria-pressed", index === this.active);
        button.setAttribute("aria-label", `Exemplar ${index + 1}`);
        const image = item.picture.cloneNode();
        image.alt = "";
        button.append(image);
        const remove = document.createElement("button");
        remove.type = "button";
        remove.className = "pbe-remove";
        remove.dataset.remove = index;
        remove.textContent = "×";
        remove.setAttribute("aria-label", `Remove exemplar ${index + 1}`);
        return [button, remove];
      }));
    }

    chosen(input) {
      if (input.dataset.file) {
        this.open([...input.files], input.dataset.file === "mask" ? "mask" : this.kind);
        input.value = "";
      }
      if (input.dataset.size !== undefined) this.draw();
    }

    clicked(event) {
      const button = event.target.closest("button");
      if (!button) return;
      const { tool, act, item, remove } = button.dataset;
      if (tool) this.take(tool);
      if (act === "undo") this.step(this.past, this.future);
      if (act === "redo") this.step(this.future, this.past);
      if (act === "clear" && this.item) this.change((pen) => pen.clearRect(0, 0, this.mask.width, this.mask.height));
      if (act === "whole" && this.item) { this.item.crop = null; this.draw(); this.say("The whole image is the exemplar."); }
      if (item !== undefined) this.show(Number(item));
      if (remove !== undefined) { this.items.splice(Number(remove), 1); this.show(this.active); }
    }

    take(tool) {
      this.tool = tool;
      for (const each of this.root.querySelectorAll("[data-tool]")) {
        each.setAttribute("aria-pressed", each.dataset.tool === tool);
      }
      this.draw();
    }

    // Where the picture lies on the stage: it is fitted into it.
    frame() {
      const { clientWidth: width, clientHeight: height } = this.stage;
      const scale = Math.min(width / this.image.width, height / this.image.height);
      return { scale, left: (width - this.image.width * scale) / 2, top: (height - this.image.height * scale) / 2 };
    }

    at(event) {
      const box = this.stage.getBoundingClientRect();
      const { scale, left, top } = this.frame();
      return {
        x: (event.clientX - box.left - this.stage.clientLeft - left) / scale,
        y: (event.clientY - box.top - this.stage.clientTop - top) / scale,
      };
    }

    down(event) {
      if (!this.item || event.button) return;
      this.stage.setPointerCapture(event.pointerId);
      this.begin(this.at(event));
    }

    begin(point) {
      this.start = point;
      this.cursor = point;
      if (this.kind === "image" && this.tool !== "box") { this.remember(); this.stroke(point, point); }
      this.draw();
    }

    move(event) {
      if (!this.item) return;
      const point = this.at(event);
      if (this.start && this.kind === "image" && this.tool !== "box") this.stroke(this.cursor, point);
      this.cursor = point;
      this.draw();
    }

    up() {
      if (!this.start) return;
      const box = this.box();
      this.start = null;
      if (this.kind === "exemplar") this.crop(box);
      else if (this.tool === "box") {
        if (box.width && box.height) this.change((pen) => { pen.fillStyle = COLOUR; pen.fillRect(box.x, box.y, box.width, box.height); });
      } else this.harden();
      this.draw();
    }

    box() { // between start and cursor, in whole pixels of the picture
      const side = (axis, length) =>
        [this.start[axis], this.cursor[axis]].map((each) => clamp(Math.round(each), 0, length)).sort((a, b) => a - b);
      const [left, right] = side("x", this.image.width);
      const [top, bottom] = side("y", this.image.height);
      return { x: left, y: top, width: right - left, height: bottom - top };
    }

    crop(box) {
      if (box.width < 4 || box.height < 4) return; // a click, no box
      const { width, height } = this.image;
      this.item.crop = [box.x / width, box.y / height, (box.x + box.width) / width, (box.y + box.height) / height];
      this.say("The part in the box is the exemplar.");
    }

    stroke(from, to) {
      const pen = this.mask.getContext("2d");
      pen.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
      pen.strokeStyle = pen.fillStyle = COLOUR;
      pen.lineWidth = this.radius * 2;
      pen.lineCap = pen.lineJoin = "round";
      pen.beginPath();
      pen.moveTo(from.x, from.y);
      pen.lineTo(to.x + 0.01, to.y);
      pen.stroke();
      pen.globalCompositeOperation = "source-over";
    }

    change(paint) {
      this.remember();
      paint(this.mask.getContext("2d"));
      this.harden();
    }

    alpha() {
      const { data } = this.mask.getContext("2d", { willReadFrequently: true })
        .getImageData(0, 0, this.mask.width, this.mask.height);
      const alpha = new Uint8Array(data.length / 4);
      for (let i = 0; i < alpha.length; i++) alpha[i] = data[4 * i + 3] > 127 ? 1 : 0;
      return alpha;
    }

    setAlpha(alpha) {
      const pen = this.mask.getContext("2d");
      const pixels = pen.createImageData(this.mask.width, this.mask.height);
      for (let i = 0; i < alpha.length; i++) if (alpha[i]) pixels.data.set([255, 45, 120, 255], 4 * i);
      pen.putImageData(pixels, 0, 0);
    }

    // What is shown is what is sent: no pixel is masked by half.
    harden() {
      this.setAlpha(this.alpha());
      this.hint();
    }

    hint() {
      const alpha = this.alpha();
      const share = alpha.reduce((sum, each) => sum + each, 0) / alpha.length;
      const all = share > 0.9 ? " That is nearly all: mask less, so that the model sees what to fit to." : "";
      this.say(share ? `The mask covers ${Math.max(share * 100, 0.1).toFixed(1)} % of the image.${all}` : "No mask.");
    }

    remember() {
      this.past.push({ alpha: this.alpha(), file: this.maskFile });
      if (this.past.length > UNDO) this.past.shift();
      this.future = [];
      this.maskFile = null;
    }

    step(from, to) {
      const state = from.pop();
      if (!state) return;
      to.push({ alpha: this.alpha(), file: this.maskFile });
      this.maskFile = state.file;
      this.setAlpha(state.alpha);
      this.hint();
    }

    setMask(shown, name) {
      if (!this.item) throw new Error("Open the image first, then its mask.");
      this.remember();
      const canvas = document.createElement("canvas");
      canvas.width = this.mask.width;
      canvas.height = this.mask.height;
      const pen = canvas.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(shown, 0, 0, canvas.width, canvas.height);
      const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
      this.setAlpha(Uint8Array.from({ length: data.length / 4 }, (_, i) => (data[4 * i] > 127 ? 1 : 0)));
      this.maskFile = name;
    }

    maskSent() {
      if (this.maskFile) return `file:${this.maskFile}`;
      const alpha = this.alpha();
      if (!alpha.includes(1)) return "";
      const canvas = document.createElement("canvas");
      canvas.width = this.mask.width;
      canvas.height = this.mask.height;
      const pen = canvas.getContext("2d");
      const pixels = pen.createImageData(canvas.width, canvas.height);
      for (let i = 0; i < alpha.length; i++) pixels.data.set([alpha[i] * 255, alpha[i] * 255, alpha[i] * 255, 255], 4 * i);
      pen.putImageData(pixels, 0, 0);
      return canvas.toDataURL("image/png");
    }

    wheel(event) {
      if (!this.item || this.kind !== "image" || this.tool === "box" || event.ctrlKey) return;
      event.preventDefault();
      this.resize(event.deltaY < 0 ? 4 : -4);
    }

    resize(by) {
      this.slider.value = Number(this.slider.value) + by;
      this.draw();
    }

    key(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const tools = { b: "brush", e: "eraser", x: "box" };
      const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
      const command = event.ctrlKey || event.metaKey;
      if (!this.item) return;
      if (command && key === "z") event.shiftKey ? this.step(this.future, this.past) : this.step(this.past, this.future);
      else if (command && key === "y") this.step(this.future, this.past);
      else if (command) return;
      else if (moves[key]) this.walk(moves[key], event.shiftKey);
      else if (key === " ") this.press();
      else if (this.kind === "image" && tools[key]) this.take(tools[key]);
      else if (this.kind === "image" && (key === "[" || key === "]")) this.resize(key === "]" ? 4 : -4);
      else return;
      event.preventDefault();
    }

    walk([x, y], fine) {
      const { width, height } = this.image;
      const from = this.cursor ?? { x: width / 2, y: height / 2 };
      const by = fine ? 1 : Math.max(Math.max(width, height) / 32, 1);
      this.cursor = { x: clamp(from.x + x * by, 0, width), y: clamp(from.y + y * by, 0, height) };
      this.draw();
    }

    press() { // of the space bar
      this.cursor ??= { x: this.image.width / 2, y: this.image.height / 2 };
      const boxes = this.kind === "exemplar" || this.tool === "box";
      if (this.start) this.up();
      else { this.begin(this.cursor); if (!boxes) this.up(); }
    }

    draw() { // what lies over the picture: the cursor, a box that is being drawn, the crop
      const ratio = window.devicePixelRatio || 1;
      const { clientWidth: width, clientHeight: height } = this.stage;
      this.over.width = width * ratio;
      this.over.height = height * ratio;
      if (!this.item) return;
      const pen = this.over.getContext("2d");
      const { scale, left, top } = this.frame();
      pen.setTransform(ratio * scale, 0, 0, ratio * scale, left * ratio, top * ratio);
      const outline = (path) => {
        for (const [colour, line] of [["#000", 3], ["#fff", 1.5]]) {
          pen.strokeStyle = colour;
          pen.lineWidth = line / scale;
          pen.beginPath();
          path();
          pen.stroke();
        }
      };
      const boxes = this.kind === "exemplar" || this.tool === "box";
      const [w, h] = [this.image.width, this.image.height];
      let box = this.start && boxes ? this.box() : null;
      if (!box && this.kind === "exemplar" && this.item.crop) {
        const [l, t, r, b] = this.item.crop;
        box = { x: l * w, y: t * h, width: (r - l) * w, height: (b - t) * h };
      }
      if (box) {
        if (this.kind === "exemplar") {
          pen.fillStyle = "rgba(0, 0, 0, .55)";
          pen.beginPath();
          pen.rect(0, 0, w, h);
          pen.rect(box.x, box.y, box.width, box.height);
          pen.fill("evenodd");
        }
        outline(() => pen.rect(box.x, box.y, box.width, box.height));
      }
      if (this.cursor && this.kind === "image") {
        const size = boxes ? 4 / scale : this.radius;
        outline(() => pen.arc(this.cursor.x, this.cursor.y, size, 0, 2 * Math.PI));
      } else if (this.cursor) outline(() => pen.arc(this.cursor.x, this.cursor.y, 4 / scale, 0, 2 * Math.PI));
    }
  }

  // The viewer of results: which edit is shown, the slider, going on from a result.
  function compare(input) {
    input.parentElement.style.setProperty("--cut", `${input.value}%`);
  }

  async function clickedResults(event) {
    const button = event.target.closest("button");
    if (!button) return;
    const panel = button.closest(".pbe-results");
    const { show, use, wider } = button.dataset;
    if (wider !== undefined) document.querySelector("#pbe-wider").click();
    if (show !== undefined) {
      panel.querySelectorAll("figure").forEach((each, index) => { each.hidden = index !== Number(show); });
      panel.querySelectorAll("[data-show]").forEach((each) => each.setAttribute("aria-pressed", each === button));
    }
    if (use) {
      const board = boards.image;
      try {
        const { name, width, height } = await answer(await fetch(`files/${use}`, { method: "POST" }));
        board.add(name, await picture(name), width, height);
        board.root.scrollIntoView({ block: "nearest", behavior: "smooth" });
      } catch (error) {
        board.say(error.message, true);
      }
    }
  }

  async function clickedExample(event) {
    const number = event.target.closest("[data-example]")?.dataset.example;
    if (number === undefined) return;
    const file = async (kind) => (await fetch(`examples/${number}/${kind}.png`)).blob();
    boards.exemplar.items = [];
    await boards.image.open([await file("image")]);
    await boards.image.open([await file("mask")], "mask");
    await boards.exemplar.open([await file("exemplar")]);
    document.querySelector("#pbe-run").click();
    document.querySelector(".pbe-results").scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  function crisp(event) {
    const image = event.target;
    if (image.tagName === "IMG" && image.closest('[class*="pbe-"]')) {
      image.classList.toggle("pbe-crisp", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
    }
  }

  function held(event) { // C shows the image before as long as it is held
    const typing = event.target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");
    if (event.key !== "c" || event.ctrlKey || event.metaKey || typing) return;
    for (const input of document.querySelectorAll(".pbe-compare input")) {
      const full = event.type === "keydown";
      input.parentElement.style.setProperty("--cut", full ? "100%" : `${input.value}%`);
    }
  }

  function pasted(event) {
    const files = [...(event.clipboardData?.files ?? [])].filter((each) => each.type.startsWith("image/"));
    if (files.length) boards[lastBoard]?.open(files);
  }

  document.addEventListener("keydown", held);
  document.addEventListener("keyup", held);
  document.addEventListener("paste", pasted);
  document.addEventListener("load", crisp, true);

  window.pbe = {
    mount(element) {
      const board = element.querySelector(".pbe-board");
      if (board) boards[board.dataset.kind] = new Board(board);
      else if (element.querySelector(".pbe-results")) {
        element.addEventListener("click", clickedResults);
        element.addEventListener("input", (event) => { if (event.target.matches(".pbe-compare input")) compare(event.target); });
      } else element.addEventListener("click", clickedExample);
    },
    ready: () => Boolean(boards.image && boards.exemplar),
    collect() {
      window.pbe.run = crypto.getRandomValues(new Uint32Array(4)).join("-");
      return JSON.stringify({
        run: window.pbe.run,
        image: boards.image?.item?.name ?? "",
        mask: boards.image?.item ? boards.image.maskSent() : "",
        exemplars: (boards.exemplar?.items ?? []).map(({ name, crop }) => ({ name, crop })),
      });
    },
  };
})();
