"use strict";
// Rankings are kept in the browser after every click, and leave it only as the file that is saved at the end.
const study = JSON.parse(document.getElementById("data").textContent);
const tasks = []; // one for each group and question, in the rater's own order of groups
const state = { rater: "", at: 0, rankings: {} };
const $ = (id) => document.getElementById(id);

function hash(text) { // FNV-1a, 32 bits
  let value = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) value = Math.imul(value ^ text.charCodeAt(i), 0x01000193) >>> 0;
  return value;
}

function shuffled(items, key) { // Fisher-Yates on mulberry32, seeded by study, rater and group
  let seed = hash(key);
  const next = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const result = items.slice();
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(next() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

const place = () => `pbe-study:${study.study}:${state.rater}`;

function remember() {
  try {
    localStorage.setItem(place(), JSON.stringify({ at: state.at, rankings: state.rankings }));
  } catch (error) {
    $("storage").hidden = false;
  }
}

function recall() {
  try {
    const saved = JSON.parse(localStorage.getItem(place()) || "null");
    if (saved) { state.at = saved.at; state.rankings = saved.rankings; }
  } catch (error) {
    $("storage").hidden = false;
  }
}

function ranking(task) {
  const group = (state.rankings[task.group.id] ??= {});
  return (group[task.question.id] ??= []);
}

const finished = (task) => ranking(task).length === task.edits.length;

function show(screen) {
  for (const id of ["start", "rank", "end"]) $(id).hidden = id !== screen;
}

function begin(event) {
  event.preventDefault();
  state.rater = $("rater").value.trim();
  if (!state.rater) return;
  Object.assign(state, { at: 0, rankings: {} });
  recall();
  tasks.length = 0;
  for (const group of shuffled(study.groups, `${study.study}/${state.rater}`)) {
    const edits = shuffled(group.edits, `${study.study}/${state.rater}/${group.id}`);
    for (const question of study.questions) tasks.push({ group, question, edits });
  }
  state.at = Math.min(Math.max(state.at, 0), tasks.length);
  go(0);
}

function go(step) {
  state.at = Math.min(Math.max(state.at + step, 0), tasks.length);
  remember();
  if (state.at === tasks.length) return finish();
  show("rank");
  const task = tasks[state.at];
  $("place").textContent = `Group ${Math.floor(state.at / study.questions.length) + 1} of ${study.groups.length}, `
    + `question ${state.at % study.questions.length + 1} of ${study.questions.length}`;
  $("progress").max = tasks.length;
  $("progress").value = state.at;
  $("question").textContent = task.question.text;
  for (const what of ["source", "hole", "exemplar"]) $(what).src = task.group[what];
  const box = $("edits");
  box.style.setProperty("--columns", task.edits.length);
  box.replaceChildren(...task.edits.map((edit, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "edit";
    button.addEventListener("click", () => choose(index));
    const picture = document.createElement("img");
    picture.src = edit.src;
    picture.alt = "";
    const badge = document.createElement("span");
    badge.className = "badge";
    badge.setAttribute("aria-hidden", "true");
    const letter = document.createElement("kbd");
    letter.textContent = index + 1;
    letter.setAttribute("aria-hidden", "true");
    button.append(picture, badge, letter);
    return button;
  }));
  mark();
  $("question").focus();
}

function mark() {
  const task = tasks[state.at], order = ranking(task);
  task.edits.forEach((edit, index) => {
    const button = $("edits").children[index], rank = order.indexOf(edit.id) + 1;
    button.classList.toggle("ranked", rank > 0);
    button.querySelector(".badge").textContent = rank || "";
    button.setAttribute("aria-pressed", rank > 0 ? "true" : "false");
    button.setAttribute("aria-label", `Edit ${index + 1}, ${rank ? `rank ${rank}` : "not ranked"}`);
  });
  const left = task.edits.length - order.length;
  $("status").textContent = left ? `Choose rank ${order.length + 1} of ${task.edits.length}.` : "All are ranked.";
  $("next").disabled = left > 0;
  $("back").disabled = state.at === 0;
  $("clear").disabled = order.length === 0;
}

function choose(index) { // the next free rank, or, on one that has a rank, that one and all after it are free again
  const task = tasks[state.at], order = ranking(task), at = order.indexOf(task.edits[index].id);
  if (at >= 0) order.splice(at);
  else {
    order.push(task.edits[index].id);
    const left = task.edits.filter((edit) => !order.includes(edit.id));
    if (left.length === 1) order.push(left[0].id);
  }
  remember();
  mark();
}

function clear() {
  ranking(tasks[state.at]).length = 0;
  remember();
  mark();
}

function result() {
  const rankings = {};
  for (const task of tasks.filter(finished)) {
    (rankings[task.group.id] ??= {})[task.question.id] = ranking(task);
  }
  return {
    format: "pbe-rankings-1", study: study.study, rater: state.rater, complete: tasks.every(finished),
    saved: new Date().toISOString(), rankings,
  };
}

function finish() {
  show("end");
  const missing = tasks.filter((task) => !finished(task)).length;
  $("summary").textContent = missing ? `${missing} of ${tasks.length} rankings are still missing.`
    : `All ${tasks.length} rankings are made. Save the file and send it back.`;
  $("save").focus();
}

function fileName() { // letters of any script; the hash tells names apart of which these leave the same
  const name = state.rater.replace(/[^\p{L}\p{M}\p{N}_-]+/gu, "_");
  return `rankings-${study.study}-${name}-${hash(state.rater).toString(16).padStart(8, "0")}.json`;
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result(), null, 1)], { type: "application/json" }));
  link.download = fileName();
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function press(event) {
  if ($("rank").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const task = tasks[state.at], digit = Number(event.key);
  if (digit >= 1 && digit <= task.edits.length) choose(digit - 1);
  else if (event.key === "Backspace") { ranking(task).pop(); remember(); mark(); }
  else if (event.key === "ArrowLeft" && state.at > 0) go(-1);
  else if ((event.key === "ArrowRight" || (event.key === "Enter" && event.target.tagName !== "BUTTON"))
    && finished(task)) go(1);
  else return;
  event.preventDefault();
}

$("form").addEventListener("submit", begin);
$("next").addEventListener("click", () => go(1));
$("back").addEventListener("click", () => go(-1));
$("clear").addEventListener("click", clear);
$("again").addEventListener("click", () => go(-1));
$("save").addEventListener("click", save);
$("part").addEventListener("click", save);
document.addEventListener("keydown", press);
