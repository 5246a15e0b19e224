// A worker of celery-node, with the tasks of interop_tasks.py that it can run.
"use strict";
const fs = require("fs");
const celery = require("celery-node");
const { INTEROP_BROKER, INTEROP_RESULTS, INTEROP_NOTES } = process.env;

const worker = celery.createWorker(INTEROP_BROKER, INTEROP_RESULTS, "interop-node");
// Keyword arguments come as one last object, empty or not.
worker.register("interop.add", (x, y) => x + y);
worker.register("interop.echo", (value) => value);
worker.register("interop.note", (value, name) => {
  fs.writeFileSync(`${INTEROP_NOTES}/${name}.draft`, JSON.stringify(value));
  fs.renameSync(`${INTEROP_NOTES}/${name}.draft`, `${INTEROP_NOTES}/${name}`);
  return value;
});
worker.register("interop.fail", (kind) => {
  throw new Error(kind);
});
worker.register("interop.clock", () => Date.now() / 1000);
worker.start();
