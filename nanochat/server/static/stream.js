// The server's API: an answer as it is written, and whether the server is there.

/** What went wrong, in words for the user. `status` is 0 if the line broke or the server was not there. */
export class ApiError extends Error {
  constructor(message, status = 0, wait = null) {
    super(message);
    this.status = status;
    this.wait = wait;   // seconds after which the server wants to be asked again
  }
}

export const BROKEN = "The connection broke off.";

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** Chunks of the answer to `body` (the request's fields), in OpenAI's format; the first may have dropped_messages. */
export async function* chat(body, key, signal) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization(key) },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
  } catch (error) {
    throw signal.aborted ? error : new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  try {
    for await (const text of events(response.body)) {
      if (text === "[DONE]") return;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError(BROKEN);
}

/** The data of each event of a text/event-stream. Pieces may end anywhere, inside an event or a character. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (buffer + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});   // who stops reading frees the server's slot
  }
}

async function refusal(response) {
  const wait = Number(response.headers.get("Retry-After")) || null;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no error of ours: a proxy's page, perhaps */ }
  return new ApiError(message, response.status, wait);
}

/** "ready", "loading" or "away". */
export async function health() {
  try {
    const response = await fetch("/health", { cache: "no-store" });
    return response.ok && (await response.json()).ready ? "ready" : "loading";
  } catch {
    return "away";
  }
}

/** The model that answers: {id, context, source}; null if the server does not say. */
export async function model(key) {
  try {
    const response = await fetch("/v1/models", { headers: authorization(key) });
    return response.ok ? (await response.json()).data[0] ?? null : null;
  } catch {
    return null;
  }
}
