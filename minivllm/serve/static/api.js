// Everything that the page asks of the server goes through here: relative addresses, the API key, errors in words.

const KEY = "minivllm-api-key";

export class Api {
  /** `askForKey()` resolves to a key that the user has typed; it is asked for only when the server wants one. */
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
    this.refusal = null; // of a user who does not want to be asked again
  }

  /** fetch, with the key. Throws an Error whose message is for the user; an abort passes as it is. */
  async fetch(path, { json, requestId, ...options } = {}) {
    for (;;) {
      const headers = requestId ? { "X-Request-Id": requestId } : {};
      const key = sessionStorage.getItem(KEY); // of this tab, and gone with it
      if (key) headers.Authorization = `Bearer ${key}`;
      if (json !== undefined) {
        headers["Content-Type"] = "application/json";
        options = { ...options, method: "POST", body: JSON.stringify(json) };
      }
      const response = await this.send(path, { ...options, headers });
      if (response.ok) return response;
      if (response.status !== 401) throw new Error(await problem(response));
      if (key === sessionStorage.getItem(KEY)) await this.newKey(Boolean(key));
    }
  }

  async send(path, options) {
    try {
      return await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
  }

  /** Ask once, however many requests were refused at the same time. */
  async newKey(wasWrong) {
    if (this.refusal) throw this.refusal;
    this.asking ??= this.askForKey(wasWrong).then((key) => sessionStorage.setItem(KEY, key));
    try {
      await this.asking;
    } catch (error) {
      this.refusal = error;
      throw error;
    } finally {
      this.asking = null;
    }
  }

  async json(path, options) {
    return (await this.fetch(path, options)).json();
  }
}

async function problem(response) {
  try {
    const { error, detail } = await response.json();
    return error?.message ?? error ?? detail ?? response.statusText;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}
