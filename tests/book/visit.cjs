// Visit pages of the built book in Chromium as readers do, with no network, and print what was seen as JSON.
//
//     node visit.cjs '{"modules": FOLDER, "chromium": FILE, "base": URL, "pages": [PATH], "axe": BOOL, "screenshots": FOLDER}'
//
// `base` is the book's own http origin or a file:// folder. A request to anywhere else is refused and reported. On every
// page the driver opens all dropdowns, moves each slider by keyboard, runs axe-core in light and in dark, and looks at
// the page at phone width. The pages are opened one after the other in one browser.

const { mkdirSync } = require("fs");
const { createRequire } = require("module");
const path = require("path");

const job = JSON.parse(process.argv[2]);
const bookRequire = createRequire(path.join(job.modules, "package.json"));
const { chromium } = bookRequire("playwright-core");

const WIDE = { width: 1280, height: 900 };
const PHONE = { width: 390, height: 844 };
const WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';
const PATIENCE = 45000; // milliseconds until something that should appear counts as missing, on a busy machine too

const isOwn = (url) => url.startsWith(job.base) || /^(data|blob|about):/.test(url);

async function shoot(page, name, look) {
  if (!job.screenshots) return;
  await page.evaluate(() => window.scrollTo(0, 0));
  await page.screenshot({ path: path.join(job.screenshots, `${name.replaceAll("/", "_")}-${look}.png`), fullPage: true });
}

async function setTheme(page, theme) {
  await page.evaluate((value) => {
    document.documentElement.dataset.theme = value;
    document.documentElement.dataset.mode = value;
  }, theme);
  await page.waitForTimeout(400); // the theme fades some colours
}

async function violations(page) {
  const result = await page.evaluate((tags) => window.axe.run({ runOnly: tags }), WCAG);
  return result.violations.flatMap((rule) =>
    rule.nodes.map((node) => `${rule.id}: ${node.target.join(" ")}: ${node.html.slice(0, 160)}`),
  );
}

// The picture that an explorer shows now: its source and its alternative text.
const picture = (area) => area.locator("img:visible").first().evaluate((img) => ({ src: img.src, alt: img.alt }));

// Move the slider in sight by one step of the keyboard and report whether the picture followed.
async function step(page, area, axis) {
  const handle = area.locator(".noUi-handle:visible").first();
  const name = await handle.getAttribute("aria-label");
  const before = await picture(area);
  const [now, last] = await handle.evaluate((el) => ["aria-valuenow", "aria-valuemax"].map((key) => Number(el.getAttribute(key))));
  await handle.focus();
  await page.keyboard.press(now < last ? "ArrowRight" : "ArrowLeft");
  const deadline = Date.now() + PATIENCE;
  let after = await picture(area);
  while (after.src === before.src && Date.now() < deadline) {
    await page.waitForTimeout(50);
    after = await picture(area);
  }
  return { axis, name, alt: [before.alt, after.alt], moved: after.src !== before.src };
}

// Press Play where there is one, and report whether the picture followed by itself.
async function play(page, area) {
  const before = await picture(area);
  const button = area.locator(".widget-play button").first();
  await button.press("Enter");
  const deadline = Date.now() + PATIENCE;
  let after = before;
  while (after.src === before.src && Date.now() < deadline) {
    await page.waitForTimeout(50);
    after = await picture(area);
  }
  await button.press("Enter");
  return { axis: "play", name: await button.getAttribute("aria-label"), alt: [before.alt, after.alt], moved: after.src !== before.src };
}

async function explore(page) {
  const views = page.locator(VIEW);
  const seen = [];
  for (let index = 0; index < (await views.count()); index++) {
    const area = views.nth(index).locator("xpath=..");
    await area.locator(".noUi-handle:visible").first().waitFor({ timeout: PATIENCE });
    await area.locator("img:visible").first().waitFor({ timeout: PATIENCE });
    const choice = area.locator("select").first();
    const axes = (await choice.count()) ? await choice.locator("option").allTextContents() : [null];
    const steps = [];
    for (const axis of axes) {
      if (axis !== null) {
        await choice.selectOption({ label: axis });
        await area.locator(".noUi-handle:visible").first().waitFor({ timeout: PATIENCE });
      }
      steps.push(await step(page, area, axis));
    }
    if (await area.locator(".widget-play").count()) steps.push(await play(page, area));
    seen.push(steps);
  }
  return seen;
}

// Press Enter on every one of `all`, and return for each whether it was closed before and is open now.
async function openAll(page, all, closed) {
  const opened = [];
  for (const control of await page.locator(all).all()) {
    const isClosed = () => control.evaluate((el, selector) => el.matches(selector), closed);
    if (!(await isClosed())) continue;
    await control.press("Enter");
    opened.push(!(await isClosed()));
  }
  return opened;
}

async function visit(context, name) {
  const seen = { external: [], failed: [], errors: [], explorers: [], opened: [], light: [], dark: [], overflow: 0 };
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  await page.route("**/*", (route) => {
    const url = route.request().url();
    if (isOwn(url)) return route.continue();
    seen.external.push(url);
    return route.abort();
  });
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text().slice(0, 300)));
  page.on("pageerror", (error) => seen.errors.push(String(error).slice(0, 300)));
  page.on("requestfailed", (request) => isOwn(request.url()) && seen.failed.push(request.url()));
  page.on("response", (response) => response.status() >= 400 && seen.failed.push(`${response.status()} ${response.url()}`));
  try {
    await page.goto(job.base + name, { waitUntil: "load" });
    await page.evaluate(() => window.MathJax?.startup.promise);
    seen.explorers = await explore(page);
    seen.opened = await openAll(page, "button.toggle-button", "button.toggle-button-hidden");
    await openAll(page, "details > summary", "details:not([open]) > summary");
    await setTheme(page, "light");
    await shoot(page, name, "light");
    if (job.axe) {
      await page.addScriptTag({ path: bookRequire.resolve("axe-core") });
      seen.light = await violations(page);
    }
    await setTheme(page, "dark");
    await shoot(page, name, "dark");
    if (job.axe) seen.dark = await violations(page);
    await setTheme(page, "light");
    await page.setViewportSize(PHONE);
    await page.waitForTimeout(300);
    seen.overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    await shoot(page, name, "phone");
  } catch (error) {
    seen.errors.push(`the visit ended early: ${error.message.slice(0, 600)}`);
  }
  await page.close();
  return seen;
}

async function main() {
  if (job.screenshots) mkdirSync(job.screenshots, { recursive: true });
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : []; // Chromium refuses its sandbox to root
  const browser = await chromium.launch({ executablePath: job.chromium, args });
  const context = await browser.newContext({ viewport: WIDE, reducedMotion: "reduce", colorScheme: "light" });
  const report = {};
  for (const name of job.pages) report[name] = await visit(context, name);
  await browser.close();
  console.log(JSON.stringify(report));
}

main();
