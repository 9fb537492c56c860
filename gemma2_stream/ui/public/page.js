// Chainlit's setting for a theme knows only light and dark; its page also knows the system's.
localStorage.getItem("vite-ui-theme") ?? localStorage.setItem("vite-ui-theme", "system")
// Decides which glyphs Chinese and Japanese share, and how it is read aloud.
document.documentElement.lang = navigator.language
