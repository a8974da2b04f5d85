(function () {
  "use strict";
  const get = (name) => document.getElementById(name);
  const tiles = Array.from(document.querySelectorAll("#gallery > li"));
  const step = 60; // tiles shown at a time
  let most = step;
  function filter() {
    const kind = get("f-kind").value, true_ = get("f-true").value, said = get("f-said").value;
    const low = Number(get("f-low").value), high = Number(get("f-high").value);
    get("o-low").textContent = low + " %";
    get("o-high").textContent = high + " %";
    let fitting = 0;
    for (const tile of tiles) {
      const at = tile.dataset, sure = 100 * Number(at.p);
      const fits = (!kind || at.k === kind) && (!true_ || at.t === true_) &&
        (!said || at.s === said) && sure >= low && sure <= high;
      fitting += fits;
      tile.hidden = !fits || fitting > most;
    }
    const shown = Math.min(fitting, most);
    get("shown").textContent = shown + " of " + fitting + " such images, " + tiles.length + " in all";
    get("more").hidden = shown === fitting;
    get("gallery").classList.toggle("chosen", fitting < tiles.length);
  }
  const form = get("filters");
  form.hidden = false;
  form.addEventListener("input", () => { most = step; filter(); });
  get("more").addEventListener("click", () => { most += step; filter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
