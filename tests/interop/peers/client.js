// A client of celery-node, driven as conversation.py says.
"use strict";
const readline = require("readline");
const celery = require("celery-node");
const { INTEROP_BROKER, INTEROP_RESULTS } = process.env;
const clients = new Map();

function clientFor(queue, protocol = 2) {
  const key = `${queue}/${protocol}`;
  if (!clients.has(key)) {
    const client = celery.createClient(INTEROP_BROKER, INTEROP_RESULTS, queue);
    client.conf.TASK_PROTOCOL = protocol;
    clients.set(key, client);
  }
  return clients.get(key);
}

const doing = {
  async send({ task, args, kwargs, queue, protocol }) {
    const sent = clientFor(queue, protocol).createTask(task).applyAsync(args, kwargs);
    return { id: sent.taskId, first: sent.taskId };
  },
  async get({ id, timeout }) {
    try {
      return { value: await clientFor("interop-node").asyncResult(id).get(timeout * 1000, 50) };
    } catch (error) {
      if (error.message === "TIMEOUT") throw error;
      const { exc_type, exc_message, exc_module } = error;
      const name = exc_type ? `${exc_module}.${exc_type}` : null;
      return { raised: { state: error.message, class: name, args: exc_message || [] } };
    }
  },
  async look({ id }) {
    const meta = await clientFor("interop-node").backend.getTaskMeta(id);
    return { state: meta ? meta.status : "PENDING", children: meta ? meta.children : [] };
  },
};

readline.createInterface({ input: process.stdin }).on("line", async (line) => {
  const { do: what, ...order } = JSON.parse(line);
  let answer;
  try {
    answer = await doing[what](order);
  } catch (error) {
    answer = { broken: String(error.stack) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}).on("close", () => process.exit(0));
