// Keeps a page fresh: when the authority says that something is new, the page is fetched again and those of its
// sections that are marked data-live and that changed are put in place. Without this script the page says the same;
// it only has to be loaded again.
"use strict";

(() => {
  const AGAIN_MS = 15000;
  const control = document.getElementById("control");
  const button = document.createElement("button");
  button.type = "button";
  control.append(button);

  let source = null;
  let timer = null;
  let busy = false;
  let wanted = false;
  let paused = false;

  const label = (state) => {
    button.textContent = paused ? "Follow again" : "Pause updates";
    document.documentElement.dataset.state = state;
  };

  const openOnes = (root) => new Set([...root.querySelectorAll("details[open]")].map((one) => one.id));

  const put = (old, fresh) => {
    const open = openOnes(old);
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const mark = focused && (focused.id ? `#${CSS.escape(focused.id)}` : focused.getAttribute("href") &&
      `[href="${CSS.escape(focused.getAttribute("href"))}"]`);
    const inDetails = focused && focused.closest("details");
    for (const one of fresh.querySelectorAll("details")) one.open = open.has(one.id);
    old.replaceChildren(...fresh.childNodes);
    const again = inDetails && inDetails.id
      ? old.querySelector(`#${CSS.escape(inDetails.id)} summary`) : mark && old.querySelector(mark);
    if (again) again.focus({ preventScroll: true });
  };

  const refresh = async () => {
    if (busy) { wanted = true; return; }
    busy = true;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-cache" });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        for (const old of document.querySelectorAll("[data-live]")) {
          const other = fresh.getElementById(old.id);
          if (other && other.innerHTML !== old.dataset.was) {
            const was = other.innerHTML;
            put(old, document.importNode(other, true));
            old.dataset.was = was;
          }
        }
        const asOf = fresh.getElementById("as-of");
        if (asOf) document.getElementById("as-of").replaceChildren(...document.importNode(asOf, true).childNodes);
      }
    } catch {
      // the authority is away; the next time is soon
    } finally {
      busy = false;
      if (wanted) { wanted = false; refresh(); }
    }
  };

  const poll = () => { clearInterval(timer); timer = setInterval(refresh, AGAIN_MS); };

  const stop = () => {
    clearInterval(timer);
    if (source) source.close();
    source = null;
    timer = null;
  };

  const follow = () => {
    stop();
    if (paused || document.hidden) return;
    source = new EventSource("/api/v1/live");
    source.addEventListener("open", () => { clearInterval(timer); label("live"); });
    source.addEventListener("news", (event) => {
      const news = JSON.parse(event.data);
      if (news.said.length) document.getElementById("news").textContent = news.said.join(". ");
      refresh();
    });
    source.addEventListener("error", () => {
      label("waiting");
      poll();  // too many listen, or the line is gone: look now and then
      if (source && source.readyState === EventSource.CLOSED) setTimeout(follow, AGAIN_MS);
    });
  };

  button.addEventListener("click", () => {
    paused = !paused;
    label(paused ? "paused" : "waiting");
    if (paused) stop(); else { refresh(); follow(); }
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) refresh(); follow(); });
  window.addEventListener("pagehide", stop);

  label("waiting");
  follow();
})();
