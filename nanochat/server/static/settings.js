// The settings dialog, and light or dark.

import { saveSettings, settings } from "./store.js";

const $ = (id) => document.getElementById(id);

export const RANGES = {
  temperature: { min: 0, max: 2, step: "any" },
  top_k: { min: 0, max: 200, step: 1 },
  top_p: { min: 0.01, max: 1, step: "any" },
  max_tokens: { min: 1, max: 4096, step: 1 },
  seed: { min: 0, max: 2 ** 31 - 1, step: 1 },
};

for (const [name, range] of Object.entries(RANGES)) Object.assign($(`set-${name}`), range);

/** Let the user change the settings and the system prompt of a conversation; `changed()` if they do. */
export function openSettings(conversation, changed) {
  const dialog = $("settings");
  $("set-system").value = conversation.system;
  for (const name of Object.keys(RANGES)) $(`set-${name}`).value = settings[name] ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "ok") return;
    conversation.system = settings.system = $("set-system").value.trim();
    for (const name of Object.keys(RANGES)) {
      const value = $(`set-${name}`).value;
      if (value === "") delete settings[name];
      else settings[name] = Number(value);
    }
    saveSettings();
    changed();
  }, { once: true });
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

/** The scheme the user chose, or the system's. */
export function showTheme() {
  const { theme } = settings;
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** To the other scheme; where that is the system's, the page follows the system again. */
export function toggleTheme() {
  const system = systemIsDark.matches ? "dark" : "light";
  const other = (settings.theme ?? system) === "dark" ? "light" : "dark";
  if (other === system) delete settings.theme;
  else settings.theme = other;
  saveSettings();
  showTheme();
}
