"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

// Swagger UI leaves controls without names, and examples that scroll out of reach of the keyboard.
new MutationObserver(() => {
  for (const control of document.querySelectorAll("#docs :is(select, textarea, input):not([aria-label])")) {
    control.setAttribute("aria-label", control.closest("tr")?.dataset.paramName ?? (control.tagName === "SELECT" ? "Choice" : "Body"));
  }
  for (const example of document.querySelectorAll("#docs pre:not([tabindex])")) example.tabIndex = 0;
}).observe(document.getElementById("docs"), { childList: true, subtree: true });

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  // Swagger UI would otherwise ask a public validator about the document.
  validatorUrl: null,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: 0,
  // A link inside the button that opens an operation would be two controls in one.
  plugins: [({ React }) => ({ components: { DeepLink: ({ text }) => React.createElement("span", {}, text) } })],
});
