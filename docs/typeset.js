// Reads formulas, a JSON list of [TeX, whether it has lines of its own], and writes a JSON list of their HTML.
// A formula that KaTeX cannot read is an error.
const katex = require("katex");

const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
const typeset = ([tex, displayMode]) => {
  try {
    return katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" });
  } catch (error) {
    console.error(`${error.message.split("\n")[0]} (in: ${tex.trim()})`);
    process.exit(1);
  }
};
console.log(JSON.stringify(formulas.map(typeset)));
