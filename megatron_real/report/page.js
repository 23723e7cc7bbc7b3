"use strict";
// The page's behaviour. Whatever a model wrote is set by textContent, never as markup.

const byId = (id) => document.getElementById(id);
const GROUPS_A_PAGE = 10;

// ---- light and dark ----

const root = document.documentElement;
if (matchMedia("(prefers-color-scheme: dark)").matches) root.classList.add("dark");
byId("theme").addEventListener("click", () => root.classList.toggle("dark"));

// ---- the axis of the curves: every data source has a column of each, and draws the column x ----

function setAxis(axis) {
  for (const doc of Bokeh.documents) {
    for (const source of doc._all_models.values()) {
      if (source.name === "curves") source.data = { ...source.data, x: source.data[axis] };
    }
    for (const plot of doc._all_models.values()) {
      if (plot.name !== "curve") continue;
      for (const ruler of plot.below) ruler.axis_label = axis;
      plot.reset.emit();
    }
  }
}
for (const button of document.querySelectorAll("input[name=axis]")) {
  button.addEventListener("change", () => setAxis(button.value));
}

// ---- the browser of rollouts ----

const samples = JSON.parse(byId("samples").textContent);
const LABELS = { "1": "right", "0": "wrong", "-1": "excluded" };
let page = 0;

function fill(select, values, first) {
  const before = select.value;
  select.replaceChildren();
  if (first) select.append(new Option(first, ""));
  for (const [value, text] of values) select.append(new Option(text, value));
  if ([...select.options].some((option) => option.value === before)) select.value = before;
}

const groupsOfRun = () => samples.length ? samples[Number(byId("run").value) || 0].groups : [];

function fillFilters() {
  const groups = groupsOfRun();
  const steps = [...new Set(groups.map((group) => group.step))];
  const statuses = new Set(groups.flatMap((group) => group.rollouts.map((one) => one.status)));
  fill(byId("step"), steps.map((step) => [step, step]), "any");
  fill(byId("status"), [...statuses].sort().map((status) => [status, status]), "any");
}

function matches(rollout, group) {
  const label = byId("label").value;
  const status = byId("status").value;
  const words = byId("search").value.toLowerCase();
  return (label === "" || String(rollout.label) === label)
    && (status === "" || rollout.status === status)
    && (words === "" || rollout.text.toLowerCase().includes(words)
        || group.prompt.toLowerCase().includes(words));
}

function key(rollout, name) {
  const value = name === "weight" && rollout.weight !== null ? Math.abs(rollout.weight) : rollout[name];
  return value === null ? -Infinity : value;
}

function selected() {
  const step = byId("step").value;
  const name = byId("sort").value;
  const sign = byId("descending").checked ? -1 : 1;
  const found = groupsOfRun()
    .filter((group) => step === "" || String(group.step) === step)
    .map((group) => ({ group, hits: group.rollouts.filter((one) => matches(one, group)) }))
    .filter((entry) => entry.hits.length > 0);
  if (name !== "") {
    // A group stands where its foremost rollout stands.
    const foremost = (entry) => {
      const keys = entry.hits.map((one) => key(one, name));
      return sign < 0 ? Math.max(...keys) : Math.min(...keys);
    };
    found.sort((a, b) => {
      const [one, other] = [foremost(a), foremost(b)];
      return one === other ? 0 : sign * (one < other ? -1 : 1);
    });
  }
  return found;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const figure = (value) => value === null || value === undefined ? "-" : String(Number(value.toPrecision(4)));

// How a figure of a token becomes a colour: `full` is the value of the strongest one.
const SHADES = {
  logprobs: {
    words: "The darker a token, the less likely it was to the engine that sampled it: 0 nats is clear, -5 and less is "
      + "the darkest.",
    unit: "nats",
    full: () => 5,
  },
  ratios: {
    words: "Blue tokens had become likelier than under the old policy when their update was made, orange ones less "
      + "likely; a factor of 2 is the darkest.",
    unit: "= log of the ratio",
    full: () => Math.log(2),
  },
  weights: {
    words: "The objective makes blue tokens likelier and orange ones less likely; the darker, the more. The darkest "
      + "token of a group has its largest weight.",
    unit: "= dL / d log-prob",
    full: (group) => Math.max(1e-30, ...group.rollouts.flatMap((one) => (one.weights || []).map(Math.abs))),
  },
};

function colour(name, value, full) {
  // The gradient of the loss lowers what it is positive of.
  const raised = name === "weights" ? value < 0 : name === "ratios" && value > 0;
  const strength = Math.min(1, Math.abs(value) / full) * 0.75;
  return `rgba(var(--${raised ? "up" : "down"}), ${strength.toFixed(3)})`;
}

function answerText(rollout, group) {
  const body = element("pre");
  const name = byId("shade").value;
  const figures = rollout[name];
  if (name === "" || !rollout.tokens || !figures) {
    body.textContent = rollout.text;
    return body;
  }
  const full = SHADES[name].full(group);
  rollout.tokens.forEach((text, i) => {
    const token = element("span", "token", text);
    if (figures[i] !== null) {
      token.style.backgroundColor = colour(name, figures[i], full);
      token.title = `${figures[i]} ${SHADES[name].unit}`;
    }
    body.append(token);
  });
  if (rollout.length > rollout.tokens.length) {
    body.append(element("span", "quiet", `[... ${rollout.length - rollout.tokens.length} more tokens]`));
  }
  return body;
}

function answer(rollout, hit, group) {
  const label = LABELS[String(rollout.label)];
  const box = element("div", `answer ${label}${hit ? "" : " hidden-by-filter"}`);
  const cut = rollout.finished ? "" : ", cut at the limit";
  box.append(element("strong", "", `${rollout.sample}: ${label}, ${rollout.status}`));
  box.append(element("p", "quiet",
    `reward ${figure(rollout.reward)}, score ${figure(rollout.score)}, weight ${figure(rollout.weight)}, `
    + `${rollout.length} tokens${cut}${rollout.reason ? `; ${rollout.reason}` : ""}`));
  box.append(answerText(rollout, group));
  return box;
}

function card({ group, hits }) {
  const box = element("div", "card");
  box.append(element("h3", "", `step ${group.step}, group ${group.group}: ${group.uid}`));
  box.append(element("pre", "", group.prompt));
  box.append(element("p", "quiet", `gold: ${group.gold.join("  or  ")}`));
  const answers = element("div", "answers");
  for (const rollout of group.rollouts) {
    answers.append(answer(rollout, hits.includes(rollout), group));
  }
  box.append(answers);
  return box;
}

function show() {
  const found = selected();
  const pages = Math.max(1, Math.ceil(found.length / GROUPS_A_PAGE));
  page = Math.min(page, pages - 1);
  byId("list").replaceChildren(
    ...found.slice(page * GROUPS_A_PAGE, (page + 1) * GROUPS_A_PAGE).map(card));
  const hits = found.reduce((sum, entry) => sum + entry.hits.length, 0);
  byId("place").textContent = `${hits} rollouts in ${found.length} groups, page ${page + 1} of ${pages}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
  const shade = byId("shade").value;
  byId("scale").hidden = shade === "";
  byId("scale").textContent = shade === "" ? "" : SHADES[shade].words;
}

// What no rollout of the page has cannot be chosen.
for (const option of byId("shade").options) {
  option.disabled = option.value !== "" && !samples.some((sample) => sample.groups.some(
    (group) => group.rollouts.some((one) => one[option.value])));
}
fill(byId("run"), samples.map((sample, i) => [i, sample.run]), "");
fillFilters();
byId("run").addEventListener("change", fillFilters);
byId("filters").addEventListener("input", () => { page = 0; show(); });
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => { page -= 1; show(); });
byId("next").addEventListener("click", () => { page += 1; show(); });
show();
