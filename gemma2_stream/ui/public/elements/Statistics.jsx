export default function Statistics() {
  return <p className="statistics text-xs text-muted-foreground m-0">{props.line}</p>
}
