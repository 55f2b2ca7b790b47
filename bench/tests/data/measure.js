// Measures a report inside a frame; what it finds is read from the dumped page.
const frame = document.createElement('iframe');
frame.style.cssText = `border:0;width:${width}px;height:900px`;
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  const name = element => element.id || element.className.baseVal || element.className || element.tagName;
  const shown = element => element.getClientRects().length > 0;
  const svgs = all('svg').filter(shown);
  const texts = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest('title, desc, style') || !shown(element)) continue;
    const matrix = element.ownerSVGElement && element.getScreenCTM();
    const size = parseFloat(view.getComputedStyle(element).fontSize) * (matrix ? matrix.a : 1);
    texts.push({ size, text: node.data.trim().slice(0, 40) });
  }
  const outside = [], overlapping = [], struck = [];
  for (const svg of svgs) {
    const paper = svg.viewBox.baseVal;
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBBox()]);
    const marks = [...svg.querySelectorAll('.mark')].map(mark => mark.getBBox());
    boxes.forEach(([text, box], index) => {
      if (marks.some(mark => mark.x > box.x && mark.x < box.x + box.width && mark.y < box.y + box.height - 4 && mark.y + mark.height > box.y + 4))
        struck.push(`${svg.querySelector('title').textContent}: ${text}`);
      if (box.x < -1 || box.y < -1 || box.x + box.width > paper.width + 1 || box.y + box.height > paper.height + 1)
        outside.push(`${svg.querySelector('title').textContent}: ${text}`);
      for (const [other, far] of boxes.slice(index + 1))
        if (Math.min(box.x + box.width, far.x + far.width) - Math.max(box.x, far.x) > 1 &&
            Math.min(box.y + box.height, far.y + far.height) - Math.max(box.y, far.y) > 4)
          overlapping.push(`${svg.querySelector('title').textContent}: ${text} / ${other}`);
    });
  }
  const rules = [...page.styleSheets].flatMap(sheet => [...sheet.cssRules]);
  document.getElementById('found').textContent = JSON.stringify({
    title: page.title,
    width: root.clientWidth,
    scroll_width: root.scrollWidth,
    wide: all('body *').filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > root.clientWidth + 1).map(name).slice(0, 5),
    tables: all('table').length,
    plots: svgs.length,
    hidden_plots: svgs.filter(svg => svg.getBoundingClientRect().width < 200 || svg.getBoundingClientRect().height < 50).map(name),
    slim_plots: svgs.filter(svg => svg.getBoundingClientRect().width < Math.min(544, 0.97 * page.querySelector('.plots').clientWidth)).map(name),
    struck, unmarked: all('.scroll').filter(e => e.scrollWidth > e.clientWidth + 1 && !view.getComputedStyle(e).backgroundAttachment.includes('local')).map(name),
    smallest: texts.sort((a, b) => a.size - b.size)[0],
    outside, overlapping,
    resources: view.performance.getEntriesByType('resource').map(entry => entry.name),
    dark: rules.some(rule => rule.media && rule.media.mediaText.includes('prefers-color-scheme: dark')),
    scripts: all('script').length,
    first_screen: svgs[0].getBoundingClientRect().top,
  });
};
frame.srcdoc = report;
document.body.append(frame);
