// Whether the server is there, and which model answers.

import { apiKey } from "./store.js";
import { health, model } from "./stream.js";

const $ = (id) => document.getElementById(id);
const TELLS = { away: "The server cannot be reached. Trying again …", loading: "The server is not ready yet. Waiting for it …" };

export let served = null;   // {id, context, source}
let timer = 0;              // of the next look

/** Ask the server; where it is away, tell the user and ask again, `delay` milliseconds later and then less often. */
export async function checkHealth(delay = 1000) {
  const state = await health();
  $("away").textContent = TELLS[state] ?? "";
  if (state === "ready") {
    setReachable();
  } else {
    $("away").hidden = false;
    clearTimeout(timer);
    timer = setTimeout(() => checkHealth(Math.min(2 * delay, 15_000)), delay);
  }
}

/** The server has answered. */
export function setReachable() {
  clearTimeout(timer);
  $("away").hidden = true;
  if (!served) loadModel();
}

export async function loadModel() {
  served = await model(apiKey.get());
  $("model").hidden = !served;
  if (!served) return;
  $("model").textContent = served.id;
  $("model").title = `Model ${served.id} after ${served.source}, context of ${served.context} tokens`;
}
