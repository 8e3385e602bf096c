// What begins with a slash in the message box is answered by the page itself.

import { saveSettings, settings } from "./store.js";
import { RANGES } from "./settings.js";

const NUMBERS = { temperature: "temperature", topk: "top_k", topp: "top_p", maxtokens: "max_tokens", seed: "seed" };
const HELP = `Enter sends, Shift+Enter begins a new line, Esc stops an answer, Ctrl+Shift+N begins a new conversation.
/temperature 0.8   0 to 2; 0 = always the likeliest token
/topk 50           choose among so many of the likeliest tokens; 0 = among all
/topp 0.95         choose among the likeliest tokens that make up this share
/maxtokens 512     length of an answer
/seed 42           the same answer to the same words; /seed alone: another each time
/clear             new conversation
/help              this text`;

/** Carry out a command; gives what is wrong with it, or null. `acts`: startNew(), note(text). */
export function commands(name, argument, { startNew, note }) {
  if (name === "clear") startNew();
  else if (name === "help") note(HELP);
  else if (name in NUMBERS) return setNumber(name, NUMBERS[name], argument, note);
  else return `There is no /${name}; /help lists what there is.`;
  return null;
}

function setNumber(name, key, argument, note) {
  if (!argument) {
    delete settings[key];
  } else {
    const { min, max, step } = RANGES[key];
    const value = Number(argument);
    if (!(value >= min && value <= max) || (step === 1 && !Number.isInteger(value))) {
      return `/${name} takes a ${step === 1 ? "whole number" : "number"} from ${min} to ${max}, not ${argument}.`;
    }
    settings[key] = value;
  }
  saveSettings();
  note(argument ? `${name} is now ${argument}` : `${name} is now the server's own`);
  return null;
}
