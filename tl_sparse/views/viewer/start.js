"use strict";
(() => {
  const data = JSON.parse(document.getElementById("tls-data").textContent);
  const notes = new Notes(data.circuits);
  const viewers = [...document.querySelectorAll(".viewer")].map((host) => {
    const members = [...host.querySelectorAll(".circuit")].map((article) => data.circuits[Number(article.dataset.circuit)]);
    return new Viewer(host, members, notes);
  });
  const drawings = viewers.flatMap((viewer) => viewer.drawings.map((drawing) => [viewer, drawing]));

  const followHash = () => {
    let wanted = null;
    try {
      wanted = /^#node=(?:(\d+):)?(.+)$/.exec(decodeURIComponent(location.hash));
    } catch {
      return; // not an address of ours
    }
    if (!wanted) return;
    const found = drawings.find(([, drawing]) => (wanted[1] === undefined || drawing.circuit.number === Number(wanted[1])) && drawing.place.has(wanted[2]));
    if (found) {
      const [viewer, drawing] = found;
      viewer.choose(drawing, drawing.place.get(wanted[2]), true);
      viewer.host.scrollIntoView();
    } else if (viewers.length) viewers[0].panel.host.textContent = `No circuit of this page has a node ${wanted[2]}.`;
  };
  addEventListener("hashchange", followHash);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") viewers.forEach((viewer) => viewer.choose(null, null));
    if (event.key !== "/" || !viewers.length || event.target.closest("input, textarea, select")) return;
    viewers[0].search.focus();
    event.preventDefault();
  });
  followHash();
})();
