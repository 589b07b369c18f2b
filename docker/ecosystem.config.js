// sn29 under pm2: `pm2 start docker/ecosystem.config.js --only sn29-validator`. Settings: .env or sn29.yaml in SN29_CWD, by
// default the folder that pm2 is called in; see docs/commands.md. `sn29` is looked for on PATH, so activate its virtual
// environment first, or set SN29_BIN: pm2 itself would take a file or a folder of that name in SN29_CWD. An update is yours to make: pip install the new release into
// the virtual environment, then `pm2 restart`; nothing here pulls code.
const { accessSync, constants, statSync } = require("node:fs");
const { delimiter, join, resolve } = require("node:path");

const isProgram = (path) => {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch {
    return false;
  }
};
const places = process.env.SN29_BIN ? [process.env.SN29_BIN] : process.env.PATH.split(delimiter).map((folder) => join(folder, "sn29"));
const script = places.map((path) => resolve(path)).find(isProgram);
if (!script) throw new Error(`no program ${process.env.SN29_BIN || "sn29 on PATH"}: activate its environment, or set SN29_BIN`);

const program = (name, env) => ({
  name: `sn29-${name}`,
  script,
  args: name,
  interpreter: "none",
  exec_mode: "fork",
  instances: 1,
  cwd: process.env.SN29_CWD || process.cwd(),
  autorestart: true,
  stop_exit_codes: [0],
  exp_backoff_restart_delay: 1000, // ms; doubles up to 15 s while it keeps ending
  kill_timeout: 30000, // ms after SIGINT, which ends it as SIGTERM does; a stop takes up to 10 s (--stop.within)
  treekill: false, // it ends its own children
  merge_logs: true,
  time: false, // lines have their own time
  env,
});

module.exports = {
  apps: [program("validator", { SN29_STATUS_PORT: "9129" }), program("miner", { SN29_STATUS_PORT: "9130" })],
};
